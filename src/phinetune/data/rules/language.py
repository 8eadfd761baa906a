"""Which language a text is in, by its script and its commonest words; rows that leave the file's language.

Thirteen languages of Latin script by their small words, others by their script; what is too short or unknown
has none. Meant to notice a foreign row, not to tell near relatives apart.
"""

# ruff: noqa: E501 (a language per line)
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from phinetune.data.conversation import Source
from phinetune.data.findings import Finding
from phinetune.data.rules.base import RowView, Rule

LANGUAGE = Rule(
    id="language_mix",
    severity="note",
    meaning="a few rows in another language teach neither language well",
    fix="drop or translate them; keep them if the adapter is to know both",
)

_COMMON = {
    "English": "the and of to is in that it you for was with this are have not what how can be on as at by from or if your his her they we which there would do does",
    "German": "der die das und ist nicht ich sie mit ein eine zu den von für auf dem im wie auch sich des wird sind war wir einen einer kann haben aber oder was werden bei",
    "French": "le la les de des et est un une que qui dans pour pas je vous il elle sur avec au ce sont du en ne se plus par nous être cette mais comme quelle c'est",
    "Spanish": "el la los las de que y en es un una por con para no se del al lo como más su pero sus le ya o este sí porque esta entre cuando muy sobre también está qué cómo",
    "Italian": "il lo la gli le di che e è un una per non con del della sono si da come più ma anche dei nel alla io questo ho ha cosa delle perché quando molto",
    "Portuguese": "o os as de que e é um uma para com não em do da dos das no na se por mais como mas ao você são também foi isso seu sua quando muito já está eu ele",
    "Dutch": "de het een en van is dat niet ik je op te met zijn voor er aan die maar om ook als dit bij nog wel naar kan heeft hebben wat hoe deze wordt uit",
    "Polish": "i w na z do się nie jest to że o jak co po ale od za czy tak jego dla być są oraz przez już może tylko który która ich było",
    "Swedish": "och att det som en på är av för med den till inte om ett har de jag du var han hon kan från så vi när eller hur vad men ska",
    "Danish": "og at det som en på er af for med den til ikke om et har de jeg du var han hun kan fra så vi når eller hvordan hvad men skal",
    "Finnish": "ja on ei se että en oli hän mutta ovat kuin mitä niin joka tämä kun olen voi myös ole sen minä sinä jos mikä hyvin vain kanssa",
    "Turkish": "ve bir bu da de için ne mi ile çok ben sen var daha gibi ama olarak değil olan nasıl kadar sonra en her şey şu hangi",
    "Czech": "a je v se na to že s z do i jako není ale po jsem by si co tak jak pro za od být jsou který která byl když nebo může",
}  # fmt: skip
_WORDS = {language: frozenset(text.split()) for language, text in _COMMON.items()}
SMALL_WORDS = frozenset().union(*_WORDS.values())
_SCRIPTS = {
    "Russian or another Cyrillic": re.compile("[\u0400-\u04ff]"),
    "Greek": re.compile("[\u0370-\u03ff]"),
    "Arabic script": re.compile("[\u0600-\u06ff]"),
    "Hebrew": re.compile("[\u0590-\u05ff]"),
    "Hindi or another Devanagari": re.compile("[\u0900-\u097f]"),
    "Thai": re.compile("[\u0e00-\u0e7f]"),
    "Japanese": re.compile("[\u3040-\u30ff]"),
    "Korean": re.compile("[\uac00-\ud7af]"),
    "Chinese": re.compile("[\u4e00-\u9fff]"),
}
_LETTER = re.compile(r"[^\W\d_]")
_MAX_WORDS = 120
_MAX_PLACES = 200
_MIN_WORDS = 5


def language_of(text: str, its_words: list[str]) -> str:
    """The language of a text, or "" when it is too short or unknown to say.

    >>> language_of("", "wie ist das wetter heute und was ziehe ich an".split())
    'German'
    """
    if not text.isascii():
        sample = text[:600]
        num_letters = len(_LETTER.findall(sample))
        for language, pattern in _SCRIPTS.items():
            if len(pattern.findall(sample)) * 3 > num_letters > 3:
                return language
    sample_words = its_words[:_MAX_WORDS]
    if len(sample_words) < _MIN_WORDS:
        return ""
    present = set(sample_words)
    scores = sorted(((len(present & common), language) for language, common in _WORDS.items()), reverse=True)
    best, second = scores[0], scores[1]
    return best[1] if best[0] >= 3 and best[0] >= second[0] + 2 and best[0] * 10 >= len(present) else ""


class LanguageCheck:
    """Counts languages of answers, and names the rows of one that is rare here."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._places: dict[str, list[tuple[Source, str]]] = {}

    def see(self, row: RowView) -> Iterator[Finding]:
        is_labelled = row.example.label is not None
        text = row.prompt if is_labelled else row.answer
        language = language_of(text, row.prompt_words if is_labelled else row.answer_words)
        if language:
            self.counts[language] += 1
            places = self._places.setdefault(language, [])
            if len(places) < _MAX_PLACES:
                places.append((row.source, text[:80]))
        return iter(())

    def finish(self) -> Iterator[Finding]:
        total = self.counts.total()
        if not total:
            return
        main, count = self.counts.most_common(1)[0]
        if count * 10 < total * 8:
            return
        for language, places in self._places.items():
            if self.counts[language] * 20 > total:
                continue
            for source, seen in places:
                yield LANGUAGE.finding(source, f"the answer is {language}, the file is {main}", seen=seen)
