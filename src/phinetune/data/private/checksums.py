"""The check digits of numbers of people, accounts and cards. Each takes what was found, with its signs."""

from __future__ import annotations

import hashlib
import re

_NOT_ALNUM = re.compile(r"[^0-9A-Za-z]")
# Lengths of account numbers by country, as registered.
_IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29,
    "BY": 28, "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29,
    "ES": 24, "FI": 18, "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28,
    "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20,
    "LB": 28, "LC": 32, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "MC": 27, "MD": 24, "ME": 22, "MK": 19,
    "MR": 27, "MT": 31, "MU": 30, "NL": 18, "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29,
    "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "ST": 25, "SV": 28,
    "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20,
}  # fmt: skip
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def bare(text: str) -> str:
    """Letters and digits only."""
    return _NOT_ALNUM.sub("", text)


def luhn(text: str) -> bool:
    """The sum of bank cards and personnummer.

    >>> luhn("4111 1111 1111 1111")
    True
    """
    digits = [int(char) for char in bare(text) if char.isdigit()]
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def card(text: str) -> bool:
    """Luhn, and a beginning and length that networks issue."""
    number = bare(text)
    if not number.isdigit() or len(set(number)) < 2 or not luhn(number):
        return False
    size = len(number)
    two, four = int(number[:2]), int(number[:4])
    if number[0] == "4":
        return size in (13, 16, 19)
    if two in (34, 37):
        return size == 15
    if 51 <= two <= 55 or 2221 <= four <= 2720:
        return size == 16
    if two in (36, 38) or 300 <= int(number[:3]) <= 305:
        return size == 14
    if two in (50, 60, 64, 65, 67) or two in (56, 57, 58, 63, 69):
        return 12 <= size <= 19
    return (two in (35, 62) or four == 1800 or four == 2131) and 15 <= size <= 19


def iban(text: str) -> bool:
    """The country's length, and modulo 97."""
    number = bare(text).upper()
    if _IBAN_LENGTHS.get(number[:2]) != len(number):
        return False
    return int("".join(str(int(char, 36)) for char in number[4:] + number[:4])) % 97 == 1


def de_tax_id(text: str) -> bool:
    """Germany, 11 digits: one digit of the first ten two or three times, ISO 7064 modulo 11, 10."""
    number = bare(text)
    if len(number) != 11 or not number.isdigit() or number[0] == "0":
        return False
    counts = sorted((number[:10].count(digit) for digit in set(number[:10])), reverse=True)
    if counts[0] not in (2, 3) or counts[1:2] != [1]:
        return False
    product = 10
    for digit in number[:10]:
        total = (int(digit) + product) % 10 or 10
        product = total * 2 % 11
    return (11 - product) % 10 == int(number[10])


def fr_nir(text: str) -> bool:
    """France, 13 places and a key modulo 97; 2A and 2B are Corsica."""
    number = bare(text).upper()
    if len(number) != 15 or not number[13:].isdigit():
        return False
    digits = number[:13].replace("2A", "19").replace("2B", "18")
    return digits.isdigit() and digits[0] in "12" and 97 - int(digits) % 97 == int(number[13:])


def es_dni(text: str) -> bool:
    """Spain, DNI and NIE: a letter modulo 23."""
    number = bare(text).upper()
    digits = number[:-1].replace("X", "0").replace("Y", "1").replace("Z", "2")
    return len(number) == 9 and digits.isdigit() and "TRWAGMYFPDXBNJZSQVHLCKE"[int(digits) % 23] == number[-1]


_CODICE_ODD = dict(
    zip(
        "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        [
            *[1, 0, 5, 7, 9, 13, 15, 17, 19, 21] * 2,
            *[2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23],
        ],
        strict=True,
    )
)


def it_codice_fiscale(text: str) -> bool:
    """Italy, 16 places: odd and even ones weighed by tables."""
    code = bare(text).upper()
    if len(code) != 16:
        return False
    odd = sum(_CODICE_ODD[char] for char in code[0:15:2])
    even = sum(int(char) if char.isdigit() else ord(char) - 65 for char in code[1:15:2])
    return chr(65 + (odd + even) % 26) == code[15]


def _weighted(number: str, weights: list[int], modulus: int) -> int:
    return sum(int(digit) * weight for digit, weight in zip(number, weights, strict=True)) % modulus


def nl_bsn(text: str) -> bool:
    """The Netherlands, 9 digits modulo 11."""
    number = bare(text)
    is_sound = len(number) == 9 and number.isdigit() and len(set(number)) > 1
    return is_sound and _weighted(number, [9, 8, 7, 6, 5, 4, 3, 2, -1], 11) == 0


def uk_nhs(text: str) -> bool:
    """The United Kingdom's health service, 10 digits modulo 11."""
    number = bare(text)
    if len(number) != 10 or not number.isdigit() or len(set(number)) < 3:
        return False
    return (11 - _weighted(number[:9], list(range(10, 1, -1)), 11)) % 11 == int(number[9])


def br_cpf(text: str) -> bool:
    """Brazil, 11 digits, the last two modulo 11."""
    number = bare(text)
    if len(number) != 11 or not number.isdigit() or len(set(number)) == 1:
        return False
    for size in (9, 10):
        check = _weighted(number[:size], list(range(size + 1, 1, -1)), 11)
        if int(number[size]) != (0 if check < 2 else 11 - check):
            return False
    return True


def pl_pesel(text: str) -> bool:
    """Poland, 11 digits that begin with a date of birth, modulo 10."""
    number = bare(text)
    if len(number) != 11 or not number.isdigit():
        return False
    month, day = int(number[2:4]) % 20, int(number[4:6])
    weights = [1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1]
    return 1 <= month <= 12 and 1 <= day <= 31 and _weighted(number, weights, 10) == 0


def se_personnummer(text: str) -> bool:
    """Sweden, a date of birth and four digits, Luhn over the last ten."""
    number = bare(text)[-10:]
    month, day = int(number[2:4]), int(number[4:6])
    return 1 <= month <= 12 and 1 <= day % 60 <= 31 and luhn(number)


def bitcoin(text: str) -> bool:
    """Base 58 with a checksum of two hashes."""
    value = 0
    for char in text:
        value = value * 58 + _BASE58.index(char)
    try:
        raw = value.to_bytes(25, "big")
    except OverflowError:
        return False
    return hashlib.sha256(hashlib.sha256(raw[:21]).digest()).digest()[:4] == raw[21:]
