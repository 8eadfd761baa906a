"""Private data that belongs to nobody, with sound check digits, and look-alikes that are none."""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable

from phinetune.data.private import checksums

Made = Callable[[random.Random], str]


def digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice(string.digits) for _ in range(count))


def until(make: Made, is_sound: Callable[[str], bool]) -> Made:
    """Draw until the check digits fit."""

    def made(rng: random.Random) -> str:
        while not is_sound(text := make(rng)):
            pass
        return text

    return made


def grouped(text: str, *sizes: int, by: str = " ") -> str:
    parts, at = [], 0
    for size in sizes:
        parts.append(text[at : at + size])
        at += size
    return by.join(part for part in [*parts, text[at:]] if part)


def luhn_completed(body: str) -> str:
    return next(body + digit for digit in string.digits if checksums.luhn(body + digit))


def card(rng: random.Random) -> str:
    begin, size = rng.choice([("4", 16), ("51", 16), ("55", 16), ("37", 15), ("6011", 16), ("2221", 16)])
    number = luhn_completed(begin + digits(rng, size - len(begin) - 1))
    if size == 15:
        return rng.choice([number, grouped(number, 4, 6, 5)])
    return rng.choice([number, grouped(number, 4, 4, 4, 4), grouped(number, 4, 4, 4, 4, by="-")])


def iban(rng: random.Random) -> str:
    country, body = rng.choice([("DE", 18), ("FR", 23), ("ES", 20), ("NL", 4), ("GB", 4), ("IT", 22)])
    text = digits(rng, body)
    if country in ("NL", "GB"):
        text = "".join(rng.choice(string.ascii_uppercase) for _ in range(4)) + digits(
            rng, {"NL": 10, "GB": 14}[country]
        )
    elif country == "IT":
        text = rng.choice(string.ascii_uppercase) + text
    number = int("".join(str(int(char, 36)) for char in f"{text}{country}00"))
    whole = f"{country}{98 - number % 97:02d}{text}"
    return rng.choice([whole, grouped(whole, *[4] * 8)])


def es_dni(rng: random.Random) -> str:
    number = digits(rng, 8)
    return number + rng.choice(["", "-"]) + "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23]


def fr_nir(rng: random.Random) -> str:
    body = (
        f"{rng.choice('12')}{digits(rng, 2)}{rng.randint(1, 12):02d}{rng.randint(1, 95):02d}{digits(rng, 6)}"
    )
    whole = f"{body}{97 - int(body) % 97:02d}"
    return rng.choice([whole, grouped(whole, 1, 2, 2, 2, 3, 3, 2)])


def it_codice_fiscale(rng: random.Random) -> str:
    letters = "".join(rng.choice(string.ascii_uppercase) for _ in range(6))
    body = f"{letters}{digits(rng, 2)}{rng.choice('ABCDEHLMPRST')}{rng.randint(1, 31):02d}H{digits(rng, 3)}"
    return next(body + char for char in string.ascii_uppercase if checksums.it_codice_fiscale(body + char))


def bitcoin(rng: random.Random) -> str:
    raw = b"\x00" + rng.randbytes(20)
    whole = raw + hashlib.sha256(hashlib.sha256(raw).digest()).digest()[:4]
    value, text = int.from_bytes(whole, "big"), ""
    while value:
        value, rest = divmod(value, 58)
        text = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"[rest] + text
    return "1" + text


def cpf(rng: random.Random) -> str:
    number = until(lambda rng: digits(rng, 11), checksums.br_cpf)(rng)
    return f"{number[:3]}.{number[3:6]}.{number[6:9]}-{number[9:]}"


def personnummer(rng: random.Random) -> str:
    body = f"{rng.randint(20, 99)}{rng.randint(1, 12):02d}{rng.randint(1, 28):02d}{digits(rng, 3)}"
    whole = luhn_completed(body)
    return f"{whole[:6]}-{whole[6:]}"


def pesel(rng: random.Random) -> str:
    return until(
        lambda rng: f"{digits(rng, 2)}{rng.randint(1, 12):02d}{rng.randint(1, 28):02d}{digits(rng, 5)}",
        checksums.pl_pesel,
    )(rng)


def token(rng: random.Random, size: int, letters: str = string.ascii_letters + string.digits) -> str:
    return "".join(rng.choice(letters) for _ in range(size - 2)) + "a7"


CHECKED: dict[str, Made] = {
    "card": card,
    "iban": iban,
    "es_dni": es_dni,
    "fr_nir": fr_nir,
    "it_codice_fiscale": it_codice_fiscale,
    "bitcoin": bitcoin,
    "br_cpf": cpf,
    "se_personnummer": personnummer,
    "de_tax_id": lambda rng: (
        "Steuer-ID: "
        + grouped(
            until(lambda rng: str(rng.randint(1, 9)) + digits(rng, 10), checksums.de_tax_id)(rng), 2, 3, 3, 3
        )
    ),
    "pl_pesel": lambda rng: "PESEL " + pesel(rng),
    "nl_bsn": lambda rng: "BSN " + until(lambda rng: digits(rng, 9), checksums.nl_bsn)(rng),
    "uk_nhs": lambda rng: (
        "NHS number " + grouped(until(lambda rng: digits(rng, 10), checksums.uk_nhs)(rng), 3, 3, 4)
    ),
}
FIRST = ["ann", "bob.lee", "c_ruiz", "dora+news", "e.van-dam", "f99", "gio", "hana.sato"]
HOSTS = [
    "example.org",
    "mail.example.com",
    "example.co.uk",
    "firma-beispiel.de",
    "exemple.fr",
    "correo.example.es",
]
PATTERNS: dict[str, Made] = {
    "email": lambda rng: f"{rng.choice(FIRST)}{rng.randint(1, 99)}@{rng.choice(HOSTS)}",
    "phone": lambda rng: rng.choice(
        [
            f"({rng.randint(200, 989)}) {rng.randint(200, 999)}-{digits(rng, 4)}",  # United States
            f"+1 {rng.randint(200, 989)} {rng.randint(200, 999)} {digits(rng, 4)}",
            f"{rng.randint(200, 989)}-{rng.randint(200, 999)}-{digits(rng, 4)}",
            f"+44 20 {digits(rng, 4)} {digits(rng, 4)}",  # United Kingdom
            f"020 {rng.randint(7000, 8999)} {digits(rng, 4)}",
            f"07{digits(rng, 3)} {digits(rng, 6)}",
            f"+49 30 {digits(rng, 7)}",  # Germany
            f"030 {rng.randint(2, 9)}{digits(rng, 6)}",
            f"0{rng.randint(151, 179)}/{digits(rng, 7)}",
            f"+33 6 {grouped(digits(rng, 8), 2, 2, 2, 2)}",  # France
            f"0{rng.randint(1, 9)} {grouped(digits(rng, 8), 2, 2, 2, 2)}",
            f"+34 6{digits(rng, 2)} {digits(rng, 3)} {digits(rng, 3)}",  # Spain
            f"6{digits(rng, 2)} {digits(rng, 3)} {digits(rng, 3)}",
        ]
    ),
    "ip": lambda rng: ".".join(str(rng.randint(11, 223)) for _ in range(4)),
    "mac": lambda rng: ":".join(f"{rng.randrange(256):02x}" for _ in range(6)),
    "us_ssn": lambda rng: f"{rng.randint(1, 665):03d}-{rng.randint(1, 99):02d}-{rng.randint(1, 9999):04d}",
    "uk_nino": lambda rng: "JK " + grouped(digits(rng, 6), 2, 2, 2) + rng.choice([" A", "B", " C"]),
    "date_of_birth": lambda rng: (
        f"born on {rng.randint(1, 28):02d}/{rng.randint(1, 12):02d}/{rng.randint(1940, 2005)}"
    ),
    "aws_key": lambda rng: "AKIA" + token(rng, 16, string.ascii_uppercase + string.digits).upper(),
    "github_token": lambda rng: "ghp_" + token(rng, 36),
    "slack_token": lambda rng: f"xoxb-{digits(rng, 11)}-{token(rng, 24)}",
    "google_key": lambda rng: "AIza" + token(rng, 35),
    "stripe_key": lambda rng: "sk_live_" + token(rng, 24),
    "model_api_key": lambda rng: "sk-" + token(rng, 40),
    "jwt": lambda rng: f"eyJ{token(rng, 20)}.eyJ{token(rng, 40)}.{token(rng, 43)}",
    "url_password": lambda rng: f"https://bob:{token(rng, 12)}@db.example.org/x",
    "secret": lambda rng: f"api_key = '{token(rng, 24)}'",
    "private_key": lambda rng: (
        f"-----BEGIN RSA PRIVATE KEY-----\n{token(rng, 64)}\n-----END RSA PRIVATE KEY-----"
    ),
}
LOOK_ALIKES: tuple[Made, ...] = (
    lambda rng: f"order {digits(rng, 7)}",
    lambda rng: f"in {rng.randint(1800, 2030)} and {rng.randint(1800, 2030)}",
    lambda rng: f"{rng.randint(1, 99)}.{digits(rng, 2)} euros",
    lambda rng: f"{rng.randint(1, 999)},{digits(rng, 3)},{digits(rng, 3)} people",
    lambda rng: f"version {rng.randint(1, 9)}.{rng.randint(0, 20)}.{rng.randint(0, 20)}.{rng.randint(0, 99)}",
    lambda rng: f"on {rng.randint(2000, 2030)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
    lambda rng: f"at {rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}:{rng.randint(0, 59):02d}",
    lambda rng: f"{digits(rng, 3)} + {digits(rng, 3)} = {digits(rng, 4)}",
    lambda rng: f"ISBN 978-{digits(rng, 1)}-{digits(rng, 4)}-{digits(rng, 4)}-{digits(rng, 1)}",
    lambda rng: f"from {rng.randint(1, 500)}-{rng.randint(501, 999)} pages",
    lambda rng: f"a[{digits(rng, 2)}] = {digits(rng, 5)}",
    lambda rng: "the password must have eight characters",
    lambda rng: f"pi is 3.14159{digits(rng, 10)}",
    lambda rng: "write to me @home, or see user@localhost",
    lambda rng: f"ticket #{digits(rng, 6)}-{digits(rng, 2)}",
    lambda rng: f"coordinates {rng.randint(10, 80)}.{digits(rng, 4)}, {rng.randint(10, 80)}.{digits(rng, 4)}",
    lambda rng: f"{hashlib.sha256(str(rng.random()).encode()).hexdigest()}",
    lambda rng: f"{rng.randint(1, 20)} 500 000 inhabitants",
)
