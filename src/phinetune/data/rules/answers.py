"""Answers that another assistant gave in its own manner: talk about being an AI, and refusals."""

# ruff: noqa: E501 (patterns read best unbroken)
from __future__ import annotations

import re
from collections.abc import Iterator

from phinetune.data.findings import Finding
from phinetune.data.rules.base import RowCheck, RowView, Rule

BOILERPLATE = Rule(
    id="boilerplate",
    severity="warning",
    meaning="the adapter will say of itself what another program's makers wrote",
    fix="write the answer anew, or drop the row: phinetune data clean",
    can_clean="the row is dropped",
)
REFUSAL = Rule(
    id="refusal",
    severity="note",
    meaning="a few refusals among plain answers teach the model to refuse",
    fix="drop the row if it refuses a fair request; keep it if refusing is the task",
    can_clean="the row is dropped, only where asked for: --rule refusal",
)

_MODEL = r"(?:an? )?(?:AI|artificial intelligence|large language|language|AI language|chat)"
_BOILERPLATE = re.compile(
    rf"\bas {_MODEL}(?: language)?(?: model| assistant| program| bot| chatbot|,)"
    rf"|\bI(?:'m| am|’m) (?:just |only |merely |simply )?(?:an? )(?:AI|artificial intelligence|(?:large |AI )?language model)"
    r"(?: language)?(?: model| assistant| program| chatbot| developed| created| trained| designed|[,. ])"
    r"|\bI (?:do not|don't|don’t) have (?:personal|human) (?:opinions?|feelings?|experiences?|preferences?|emotions?|beliefs?)"
    r"|\bmy (?:knowledge|training)(?: data)?(?: cut[- ]?off| only goes| was last updated| goes up)"
    r"|\b(?:developed|created|trained) by (?:OpenAI|Anthropic|Google DeepMind|Meta AI|Microsoft AI)\b"
    r"|\bAls (?:KI|künstliche Intelligenz|Sprachmodell|KI-Sprachmodell)\b"
    r"|\bEn tant qu(?:e |'|’)(?:IA|intelligence artificielle|modèle de langage|assistant IA)"
    r"|\bComo (?:una? )?(?:IA|inteligencia artificial|modelo de lenguaje|modelo de IA)\b",
    re.IGNORECASE,
)
_ACT = r"(?:help|assist|provide|fulfil+|comply|answer|do that|complete|generate|create|write|support|continue|discuss|engage|share)"
_REFUSAL = re.compile(
    r"(?:^|[.!] |\n)(?:(?:I'm|I am|I’m)(?: really| very| so)? sorry[,.]?|sorry[,.]?|I apologi[sz]e[,.]?|unfortunately,?)?(?: but)? ?"
    rf"(?:I (?:can't|cannot|can not|can’t|won't|will not|won’t|am unable to|am not able to|must decline to) (?:\w+ )?{_ACT}"
    rf"|(?:I'm|I’m) (?:unable|not able) to (?:\w+ )?{_ACT}"
    r"|I must decline|I have to decline|I (?:can't|cannot|can’t) (?:do|say) that"
    r"|it (?:would be|is|wouldn't be|would not be|is not) (?:un)?(?:ethical|appropriate)[^.]{0,40}for me to"
    r"|(?:I'm|I am|I’m) sorry,? but (?:that|this|your request)[^.]{0,60}(?:against|inappropriate|not something))"
    r"|^(?:Es tut mir leid|Tut mir leid),? (?:aber )?(?:ich kann|das kann ich)"
    r"|^(?:Je suis désolée?|Désolée?),? (?:mais )?je ne peux pas"
    r"|^Lo siento,? (?:pero )?no puedo",
    re.IGNORECASE,
)
_OPENING_CHARS = 160


class AnswersCheck(RowCheck):
    """Boiler-plate anywhere in an answer; a refusal at its beginning."""

    def see(self, row: RowView) -> Iterator[Finding]:
        for field, role, text in row.parts:
            if role != "assistant":
                continue
            if found := _BOILERPLATE.search(text):
                message = "the answer speaks as another program"
                yield BOILERPLATE.finding(row.source, message, field=field, seen=text, around=found.start())
            if refusal := _REFUSAL.search(text[:_OPENING_CHARS]):
                place = refusal.start()
                yield REFUSAL.finding(row.source, "the answer refuses", field=field, seen=text, around=place)
