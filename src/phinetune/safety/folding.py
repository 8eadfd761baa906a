"""Text as a filter reads it: the same words in other clothes become the same letters.

Compatibility forms (NFKC), case, invisible characters, accents, and letters of other alphabets that look
like Latin ones are folded. Knows nothing of what is looked for.
"""

from __future__ import annotations

import unicodedata

# Cyrillic, Greek and other letters with the Latin letter that each looks like.
_LOOKALIKES = str.maketrans(
    "авеёікмнорстухѕјԁԛԝһӏαεηικνορτυχωϲϳıłøđ",
    "abeeikmhopctyxsjdqwhlaenikvoptuxwcjilod",
)
_INVISIBLE = ("Cf", "Mn", "Me")


def fold(text: str) -> str:
    """The folded text.

    >>> fold("Ｈ\\u200bа\\u0301te")
    'hate'
    """
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text)).casefold()
    kept = "".join(char for char in plain if unicodedata.category(char) not in _INVISIBLE)
    return kept.translate(_LOOKALIKES)
