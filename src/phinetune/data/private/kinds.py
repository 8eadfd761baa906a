"""The kinds of private data and secrets that are looked for, each a pattern with its checksum if it has one.

Names, addresses and what only a reader understands are not covered, and reports say so.
"""

# ruff: noqa: E501 (the table of kinds reads best with a kind per line)
from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from phinetune.data.private import checksums

NOT_COVERED = (
    "names of people",
    "postal addresses",
    "dates of birth without a word that says so",
    "faces and voices",
)
_CONTEXT_CHARS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind. Where a number alone says too little, one of `context`'s words must stand shortly before it."""

    name: str
    pattern: re.Pattern[str]
    placeholder: str
    is_sound: Callable[[str], bool] | None = None
    context: re.Pattern[str] | None = None
    is_secret: bool = False
    # What a text must hold for the kind to be looked for at all: most texts hold nothing of it.
    needs: Literal["digits", "@", "://", "."] | tuple[str, ...] = "digits"

    def accepts(self, text: str, start: int, found: str) -> bool:
        """Whether what the pattern found at `start` is of this kind."""
        if self.context is not None and not self.context.search(text[max(0, start - _CONTEXT_CHARS) : start]):
            return False
        return self.is_sound is None or self.is_sound(found)


def _ip(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or address.is_multicast)


def _phone(text: str) -> bool:
    number = checksums.bare(text)
    return number.isdigit() and 8 <= len(number) <= 15 and len(set(number)) > 2


def _random_looking(text: str) -> bool:
    """At least three bits a letter, with digits and letters: no word, no placeholder."""
    secret = re.split(r"[=:]\s*[\"']?", text, maxsplit=1)[-1].strip("\"'")
    entropy = (
        -sum(n / len(secret) * math.log2(n / len(secret)) for n in Counter(secret).values()) if secret else 0
    )
    return entropy >= 2.8 and bool(re.search(r"\d", secret)) and bool(re.search(r"[A-Za-z]", secret))


def _words(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![A-Za-z])(?:{text})(?![A-Za-z])", re.IGNORECASE)


_EDGE, _END = r"(?<![\w.])", r"(?![\w])"
_PHONE = (
    r"(?<![\w.-])(?:"
    r"\+\d{1,3}[ .-]?(?:\(0\)[ .-]?)?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,5}"  # international
    r"|(?:1[ .-])?\(\d{3}\) ?\d{3}[ .-]\d{4}|(?:1[ .-])?\d{3}[.-]\d{3}[.-]\d{4}"  # North America
    r"|0\d{1,4}(?:[ /-]\d{2,8}){1,4}|0\d(?:\.\d{2}){4}|0\d{9,10}|\(0\d{1,4}\) ?\d{3,4}[ -]?\d{3,5}"  # Europe
    r"|[67]\d{2}(?: \d{3}){2}|[679]\d{2}(?: \d{2}){3}"
    r")(?:x\d{1,5})?(?!\w)"
)
# Written otherwise, a number is taken for one of a telephone where a word says so.
_CALLED = _words(
    r"phone|telephone|tel|call(?: \w+)?(?: at| on)?|mobile|cell|fax|whatsapp|telefon|téléphone|teléfono|handy"
)

KINDS: tuple[Kind, ...] = (
    Kind(name="private_key", placeholder="PRIVATE_KEY", is_secret=True, needs=("PRIVATE KEY",),
         pattern=re.compile(r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----(?:.*?-----END (?:[A-Z]+ )?PRIVATE KEY-----)?", re.DOTALL)),
    Kind(name="aws_key", placeholder="KEY", is_secret=True, needs=("AKIA", "ASIA"),
         pattern=re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")),
    Kind(name="github_token", placeholder="KEY", is_secret=True, needs=("ghp_", "gho_", "ghs_", "ghu_", "github_pat_"),
         pattern=re.compile(r"\b(?:gh[posu]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})\b")),
    Kind(name="slack_token", placeholder="KEY", is_secret=True, needs=("xox",),
         pattern=re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,}")),
    Kind(name="google_key", placeholder="KEY", is_secret=True, needs=("AIza",),
         pattern=re.compile(r"\bAIza[0-9A-Za-z_-]{35}(?![\w-])")),
    Kind(name="stripe_key", placeholder="KEY", is_secret=True, needs=("sk_live_", "rk_live_", "sk_test_"),
         pattern=re.compile(r"\b[sr]k_(?:live|test)_[0-9A-Za-z]{16,}\b")),
    Kind(name="model_api_key", placeholder="KEY", is_secret=True, needs=("sk-", "hf_"),
         pattern=re.compile(r"\b(?:sk-[A-Za-z0-9_-]{20,}|hf_[A-Za-z0-9]{30,})(?![\w-])"), is_sound=_random_looking),
    Kind(name="jwt", placeholder="TOKEN", is_secret=True, needs=("eyJ",),
         pattern=re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}")),
    Kind(name="url_password", placeholder="CREDENTIALS", is_secret=True, needs="://",
         pattern=re.compile(r"(?<=://)[^\s:/@\[\]]{1,64}:[^\s:/@\[\]]{1,64}(?=@)")),
    Kind(name="secret", placeholder="SECRET", is_secret=True, needs=("key", "KEY", "Key", "oken", "OKEN", "ecret", "ECRET", "assw", "ASSW"),
         pattern=re.compile(r"(?:api[_-]?key|secret(?:[_-]?key)?|access[_-]?token|auth[_-]?token|account[_-]?key|passw(?:or)?d)"
                            r"[\"']?\s{0,3}[=:]\s{0,3}[\"']?[A-Za-z0-9+/_\-!@#$%^&*]{8,}={0,2}", re.IGNORECASE),
         is_sound=_random_looking),
    Kind(name="email", placeholder="EMAIL", needs="@",
         pattern=re.compile(r"(?<![\w.+-])[A-Za-z0-9][\w.+%'-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![\w@])")),
    Kind(name="iban", placeholder="IBAN", is_sound=checksums.iban,
         pattern=re.compile(r"(?<!\w)[A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z0-9]{4}){2,7}(?:[ -]?[A-Za-z0-9]{1,3})?(?!\w)")),
    Kind(name="bitcoin", placeholder="WALLET", is_sound=checksums.bitcoin, needs=("1", "3"),
         pattern=re.compile(r"(?<!\w)[13][1-9A-HJ-NP-Za-km-z]{25,34}(?!\w)")),
    Kind(name="it_codice_fiscale", placeholder="NATIONAL_ID", is_sound=checksums.it_codice_fiscale,
         pattern=re.compile(r"(?<!\w)[A-Za-z]{6}\d{2}[A-EHLMPR-Ta-ehlmpr-t]\d{2}[A-Za-z]\d{3}[A-Za-z](?!\w)")),
    Kind(name="fr_nir", placeholder="NATIONAL_ID", is_sound=checksums.fr_nir,
         pattern=re.compile(rf"{_EDGE}[12] ?\d{{2}} ?\d{{2}} ?(?:\d{{2}}|2[ABab]) ?\d{{3}} ?\d{{3}} ?\d{{2}}{_END}")),
    Kind(name="card", placeholder="CARD", is_sound=checksums.card,
         pattern=re.compile(rf"{_EDGE}(?:\d{{4}}(?:[ -]?\d{{4}}){{2}}(?:[ -]?\d{{1,7}})?|3[47]\d{{2}}[ -]?\d{{6}}[ -]?\d{{5}}|3\d{{3}}[ -]?\d{{6}}[ -]?\d{{4}}){_END}")),
    Kind(name="es_dni", placeholder="NATIONAL_ID", is_sound=checksums.es_dni,
         pattern=re.compile(r"(?<!\w)(?:\d{8}|[XYZxyz][ -]?\d{7})[ -]?[A-HJ-NP-TV-Za-hj-np-tv-z](?!\w)")),
    Kind(name="br_cpf", placeholder="NATIONAL_ID", is_sound=checksums.br_cpf,
         pattern=re.compile(rf"{_EDGE}\d{{3}}\.\d{{3}}\.\d{{3}}-\d{{2}}{_END}")),
    Kind(name="br_cpf", placeholder="NATIONAL_ID", is_sound=checksums.br_cpf, context=_words("cpf"),
         pattern=re.compile(rf"{_EDGE}\d{{11}}{_END}")),
    Kind(name="de_tax_id", placeholder="NATIONAL_ID", is_sound=checksums.de_tax_id,
         context=_words(r"steuer\w*|idnr|id-nr|tax|tin|identifikationsnummer|steuer-id"),
         pattern=re.compile(rf"{_EDGE}\d{{2}} ?\d{{3}} ?\d{{3}} ?\d{{3}}{_END}")),
    Kind(name="pl_pesel", placeholder="NATIONAL_ID", is_sound=checksums.pl_pesel, context=_words("pesel"),
         pattern=re.compile(rf"{_EDGE}\d{{11}}{_END}")),
    Kind(name="nl_bsn", placeholder="NATIONAL_ID", is_sound=checksums.nl_bsn,
         context=_words("bsn|burgerservicenummer|sofinummer|sofi"),
         pattern=re.compile(rf"{_EDGE}\d{{4}}[ .]?\d{{2}}[ .]?\d{{3}}{_END}")),
    Kind(name="uk_nhs", placeholder="NATIONAL_ID", is_sound=checksums.uk_nhs, context=_words("nhs|health service"),
         pattern=re.compile(rf"{_EDGE}\d{{3}}[ -]?\d{{3}}[ -]?\d{{4}}{_END}")),
    Kind(name="se_personnummer", placeholder="NATIONAL_ID", is_sound=checksums.se_personnummer,
         pattern=re.compile(rf"{_EDGE}(?:19|20)?\d{{6}}[-+]\d{{4}}{_END}")),
    Kind(name="us_ssn", placeholder="NATIONAL_ID",
         pattern=re.compile(rf"{_EDGE}(?!000|666|9)\d{{3}}-(?!00)\d{{2}}-(?!0000)\d{{4}}{_END}")),
    Kind(name="uk_nino", placeholder="NATIONAL_ID",
         pattern=re.compile(r"(?<!\w)(?!BG|GB|NK|KN|TN|NT|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d{2} ?\d{2} ?\d{2} ?[A-D](?!\w)")),
    Kind(name="date_of_birth", placeholder="BIRTH_DATE",
         context=_words(r"born(?: on)?|dob|d\.o\.b|date of birth|birth ?date|birthday|geboren|geburtsdatum|née? le|nacid[oa]"),
         pattern=re.compile(rf"{_EDGE}(?:\d{{1,2}}[./-]\d{{1,2}}[./-](?:19|20)\d{{2}}|(?:19|20)\d{{2}}-\d{{2}}-\d{{2}}){_END}")),
    Kind(name="ip", placeholder="IP", is_sound=_ip, needs=".",
         pattern=re.compile(r"(?<![\w.])(?<!ersion )(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")),
    Kind(name="ip", placeholder="IP", is_sound=_ip, needs=(":",),
         pattern=re.compile(r"(?<![\w:])(?:[0-9a-fA-F]{1,4}:){2,7}(?::?[0-9a-fA-F]{1,4}){1,6}(?![\w:])")),
    Kind(name="mac", placeholder="MAC", needs=(":", "-"),
         pattern=re.compile(r"(?<![\w:-])(?:[0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}(?![\w:-])|(?<![\w:-])(?:[0-9a-fA-F]{2}-){5}[0-9a-fA-F]{2}(?![\w:-])")),
    Kind(name="phone", placeholder="PHONE", is_sound=_phone, pattern=re.compile(_PHONE)),
    Kind(name="phone", placeholder="PHONE", is_sound=_phone, context=_CALLED,
         pattern=re.compile(r"(?<![\w.-])\(?\d{2,5}\)?(?:[ .-]?\d{2,5}){1,4}(?:x\d{1,5})?(?!\w)")),
)  # fmt: skip
