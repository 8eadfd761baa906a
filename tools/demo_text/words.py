"""Random words, names, codes and numbers: the raw material for copying tasks. Knows no sentence."""

# ruff: noqa: SIM905 (word lists are easier to read as text)

from __future__ import annotations

import random
from dataclasses import dataclass, field

ONSETS = (
    "b c d f g h j k l m n p r s t v w z bl br ch cl cr dr fl fr gl gr kl kr pl pr qu sc sh sk sl sm sn "
    "sp st str sw th tr tw v w wh y z zh"
).split()
NUCLEI = ("a e i o u a e i o u ai ea ee ei ia ie io oa oo ou ue y").split()
CODAS = (
    " ".join(["-"] * 34)
    + " b d g k l l m n n p r r s s t x z ck ff ld lk ll lm lp lt mp nd ng nk nt rd rk rm rn rt "
    "sh sk sp ss st th zz"
).split()
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"


def pseudo_word(rng: random.Random, syllables: int | None = None) -> str:
    """A pronounceable word that most likely does not exist, in lower case."""
    count = syllables or rng.choice((1, 2, 2, 2, 2, 3, 3))
    parts = []
    for _ in range(count):
        coda = rng.choice(CODAS)
        onset = rng.choice(ONSETS) if rng.random() < 0.92 else ""
        parts.append(onset + rng.choice(NUCLEI) + ("" if coda == "-" else coda))
    return "".join(parts)


def code(rng: random.Random) -> str:
    """A reference such as `A7K2`, `TR-4482`, `#90215` or `48-113`."""
    letters = "".join(rng.choices(LETTERS, k=rng.randint(1, 4)))
    digits = "".join(rng.choices(DIGITS, k=rng.randint(2, 7)))
    tail = "".join(rng.choices(DIGITS, k=rng.randint(1, 4)))
    shape = rng.randrange(9)
    if shape == 0:
        return letters + digits
    if shape == 1:
        return f"{letters}-{digits}"
    if shape == 2:
        return f"#{digits}"
    if shape == 3:
        return f"{digits}-{tail}"
    if shape == 4:
        return "".join(rng.choices(LETTERS + DIGITS, k=rng.randint(3, 8)))
    if shape == 5:
        return f"{letters.lower()}{digits}"
    if shape == 6:
        return f"{letters}{digits}{rng.choice(LETTERS)}"
    return digits


@dataclass(slots=True)
class WordSource:
    """Draws words of many kinds from one random generator; `real` is a list of existing words."""

    rng: random.Random
    real: tuple[str, ...] = field(default=("apple", "river", "lamp", "garden", "wooden", "silver"))

    def word(self) -> str:
        """An invented word more often than a real one, now and then capitalised."""
        roll = self.rng.random()
        word = pseudo_word(self.rng) if roll < 0.6 else self.rng.choice(self.real)
        return word.capitalize() if self.rng.random() < 0.12 else word

    def name(self) -> str:
        """A capitalised name, sometimes of two words."""
        first = pseudo_word(self.rng, self.rng.choice((1, 2, 2, 3))).capitalize()
        if self.rng.random() < 0.15:
            return f"{first} {pseudo_word(self.rng, self.rng.choice((1, 2, 2))).capitalize()}"
        return first

    def thing(self) -> str:
        """One to three words in lower case, mostly, as a thing in a sentence would be called."""
        count = self.rng.choices((1, 2, 3), weights=(55, 38, 7))[0]
        words = [
            pseudo_word(self.rng) if self.rng.random() < 0.5 else self.rng.choice(self.real)
            for _ in range(count)
        ]
        text = " ".join(words)
        return text.title() if self.rng.random() < 0.1 else text

    def number(self) -> str:
        """A whole number of one to six digits."""
        return str(self.rng.randrange(10 ** self.rng.randint(1, 6)))

    def code(self) -> str:
        """A reference code."""
        return code(self.rng)

    def value(self) -> str:
        """Anything: a thing, a word, a name, a code or a number."""
        roll = self.rng.random()
        if roll < 0.35:
            return self.thing()
        if roll < 0.55:
            return self.word()
        if roll < 0.7:
            return self.name()
        if roll < 0.87:
            return self.code()
        return self.number()

    def words(self, low: int, high: int) -> list[str]:
        """Between `low` and `high` different words."""
        count = self.rng.randint(low, high)
        found: dict[str, None] = {}
        while len(found) < count:
            found[self.word()] = None
        return list(found)
