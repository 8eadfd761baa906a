"""Clean rows from a seed, and known faults put into them: what the rules are measured by."""

# ruff: noqa: E501 (the tables of faults read best with few breaks)
from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


def listed(text: str, separator: str | None = None) -> list[str]:
    return [part.replace("\n", " ").strip() for part in text.split(separator)]


NOUNS = listed("""bridge garden window kettle letter mountain river candle harbour market ladder basket orchard tunnel
village blanket engine feather lantern mirror pepper pillow quarry ribbon saddle temple turnip
violin wagon walnut anchor barrel cellar drawer fountain glacier hammer island jacket kitchen meadow
needle oven parrot radio sandal thread umbrella valley whistle yard zipper bucket cushion dial
envelope flute gate hinge igloo jar""")
ADJECTIVES = listed("""wooden narrow silent golden dusty hollow crooked bright ancient gentle frozen humble velvet sturdy
faded curious distant tiny rusty smooth sharp warm cloudy empty famous heavy local modern open plain
quick round""")
VERBS = listed("""carries repairs paints opens watches measures follows crosses borrows collects describes empties
finds guards hides lifts marks notices offers polishes reaches sells touches visits washes weighs""")
PLACES = listed(
    """near the old mill|behind the station|under the stairs|beside the lake|across the square|inside the
barn|along the coast|above the bakery|outside the museum|at the end of the road|by the chapel|on the
northern shore""",
    "|",
)
REASONS = listed(
    """because the evening was cold|so that nobody would slip|while the others waited|before the bell
rang|after the long rain|since the road was closed|until the sun came out|although it took a while""",
    "|",
)


@dataclass(slots=True)
class Sentences:
    """Plain English without faults, from a seed."""

    rng: random.Random = field(default_factory=lambda: random.Random(11))

    def sentence(self) -> str:
        pick = self.rng.choice
        thing = f"the {pick(ADJECTIVES)} {pick(NOUNS)}"
        end = pick([pick(PLACES).strip(), pick(REASONS).strip(), f"with a {pick(ADJECTIVES)} {pick(NOUNS)}"])
        return f"{thing.capitalize()} {pick(VERBS)} the {pick(ADJECTIVES)} {pick(NOUNS)} {end}."

    def question(self) -> str:
        pick = self.rng.choice
        begin = pick(
            [
                "What can you tell me about",
                "Please describe",
                "Who needs",
                "Where did they put",
                "Why is there",
            ]
        )
        return f"{begin} the {pick(ADJECTIVES)} {pick(NOUNS)} and the {pick(ADJECTIVES)} {pick(NOUNS)} {pick(PLACES).strip()}?"

    def answer(self) -> str:
        return " ".join(self.sentence() for _ in range(self.rng.randint(3, 6)))

    def row(self) -> dict[str, Any]:
        return chat(self.question(), self.answer())


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def content(row: dict[str, Any], turn: int) -> str:
    return str(row["messages"][turn]["content"])


def with_answer(row: dict[str, Any], answer: str) -> dict[str, Any]:
    return chat(content(row, 0), answer)


MOJIBAKE = ["Ã©", "Ã¼", "â€™", "â€œ", "Ã±", "â€“", "Ã§", "â‚¬", "Ã¨"]
HTML = ["<br>", '<div class="x">', "&nbsp;", "</p>", "&amp;", "<span>", "&#39;", "<a href='x'>", "<li>"]
BOILERPLATE = [
    "As an AI language model, I see it so.", "I'm just an AI assistant.", "As a large language model, this is known.",
    "I don't have personal opinions.", "My knowledge cutoff is recent.", "I was trained by OpenAI.", "As an AI, well.",
    "I am an AI developed to be kind.",
]  # fmt: skip
REFUSALS = [
    "I'm sorry, but I can't help with that.", "I cannot provide this information.", "I am unable to assist with it.",
    "Sorry, I can't answer that.", "Unfortunately, I cannot fulfil the request.", "I won't write this.",
    "I must decline.", "I apologize, but I cannot assist.",
]  # fmt: skip
FOREIGN = [
    "Das ist eine sehr gute Frage, und ich habe die Antwort auf dem Tisch bei den Kindern gefunden.",
    "C'est une bonne question, et je ne sais pas si les enfants sont dans le jardin avec leur père.",
    "Esta es una buena pregunta, pero no sé si los niños están en la casa con su madre.",
    "Это хороший вопрос, и я не знаю, где сейчас дети.",
    "これはとても良い質問です。子供たちは庭にいます。",
]
PRIVATE = [
    "ann.lee@example.org", "+44 20 7946 0958", "DE89 3704 0044 0532 0130 00", "4111 1111 1111 1111", "078-05-1120",
    "(415) 555-0132", "192.168.7.31", "GB82WEST12345698765432", "12345678Z",
]  # fmt: skip
SECRETS = [
    "AKIAIOSFODNN7EXAMPLE", "ghp_a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8", "sk_live_4eC39HqLyjWDarjtT1zdp7dc",
    "password = hunter2Xy9pq", "-----BEGIN PRIVATE KEY-----", "postgres://bob:s3cr3tpw@db.example.org",
]  # fmt: skip

Planter = Callable[[dict[str, Any], random.Random, Sentences], list[str]]


def _into(values: list[str]) -> Planter:
    """Put one of the values into the midst of the answer."""

    def plant(row: dict[str, Any], rng: random.Random, _: Sentences) -> list[str]:
        words = content(row, 1).split()
        words.insert(rng.randrange(1, len(words)), rng.choice(values))
        return [json.dumps(with_answer(row, " ".join(words)), ensure_ascii=False)]

    return plant


def _instead(values: list[str]) -> Planter:
    def plant(row: dict[str, Any], rng: random.Random, words: Sentences) -> list[str]:
        return [
            json.dumps(with_answer(row, f"{rng.choice(values)} {words.question()}"[:600]), ensure_ascii=False)
        ]

    return plant


def _foreign(row: dict[str, Any], rng: random.Random, _: Sentences) -> list[str]:
    return [json.dumps(with_answer(row, rng.choice(FOREIGN) + f" ({rng.choice(NOUNS)} {rng.choice(NOUNS)})"))]


def _twice(row: dict[str, Any], rng: random.Random, _: Sentences) -> list[str]:
    again = json.dumps(row)
    return [json.dumps(row), again.replace(". The", ".  The") if rng.random() < 0.5 else again]


def _nearly_twice(row: dict[str, Any], rng: random.Random, _: Sentences) -> list[str]:
    words = content(row, 1).split()
    words[rng.randrange(len(words))] = rng.choice(NOUNS)
    return [json.dumps(row), json.dumps(with_answer(row, " ".join(words)))]


def _several(row: dict[str, Any], rng: random.Random, words: Sentences) -> list[str]:
    asked = content(row, 0)
    other = asked.upper() if rng.random() < 0.5 else asked.rstrip("?") + " ?!"
    return [json.dumps(row), json.dumps(chat(other, words.answer()))]


def _outlier(row: dict[str, Any], rng: random.Random, words: Sentences) -> list[str]:
    return [json.dumps(with_answer(row, " ".join(words.answer() for _ in range(60))))]


# Rules that look at rows: the last line of what is planted is the one to be named.
IN_ROWS: dict[str, Planter] = {
    "mojibake": _into(MOJIBAKE),
    "html": _into(HTML),
    "boilerplate": _into(BOILERPLATE),
    "refusal": _instead(REFUSALS),
    "language_mix": _foreign,
    "private_data": _into(PRIVATE),
    "secret": _into(SECRETS),
    "exact_duplicate": _twice,
    "near_duplicate": _nearly_twice,
    "several_answers": _several,
    "length_outlier": _outlier,
    "control_text": _into(["<|end|>", "</s>", "<|user|>", "[INST]", "<start_of_turn>"]),
    "lost_character": _into(["caf\ufffd", "\ufffd"]),
}


def broken(kind: str, row: dict[str, Any]) -> str:
    """One line with the fault that a reading rule is for."""
    text = json.dumps(row)
    user, assistant = row["messages"]
    lines: dict[str, Any] = {
        "json": text[:-3],
        "duplicate_key": text[:-1] + ', "id": 1, "id": 2}',
        "not_finite": text[:-1] + ', "score": NaN}',
        "nesting": '{"a":' * 20_000,
        "number": text[:-1] + ', "n": ' + "9" * 5000 + "}",
        "not_an_object": "[1, 2]",
        "no_messages": {"phrase": "a", "mood": "b"},
        "preference_pair": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "messages_type": {"messages": "hello"},
        "no_turns": {"messages": []},
        "message_type": {"messages": ["hello"]},
        "no_role": {"messages": [{"content": "a"}, assistant]},
        "role": {"messages": [user | {"role": "usr"}, assistant]},
        "no_content": {"messages": [{"role": "user"}, assistant]},
        "content_type": {"messages": [user, assistant | {"content": 5}]},
        "empty_content": {"messages": [user, assistant | {"content": " \n"}]},
        "weight": {"messages": [user, assistant | {"weight": 3}]},
        "tools": {"messages": [user, assistant], "tools": [{}]},
        "system_order": {"messages": [user, {"role": "system", "content": "a"}, assistant]},
        "no_assistant": {"messages": [user]},
        "all_weights_0": {"messages": [user, assistant | {"weight": 0}]},
        "empty_text": {"text": " "},
        "text_type": {"text": 7},
        "label_type": {"text": "One text.", "label": " "},
        "surrogate": {"messages": [user, assistant | {"content": "a \ud800 b"}]},
        "two_forms": {"messages": [user, assistant], "text": "a"},
        "empty_system": {"messages": [{"role": "system", "content": ""}, user, assistant]},
        "no_user": {"messages": [assistant]},
        "no_answer": {"messages": [user, assistant, user]},
        "same_role": {"messages": [user, assistant, assistant]},
    }
    line = lines[kind]
    return line if isinstance(line, str) else json.dumps(line)


BROKEN = listed("""json duplicate_key not_finite nesting number not_an_object no_messages preference_pair messages_type
no_turns message_type no_role role no_content content_type empty_content weight tools system_order
no_assistant all_weights_0 empty_text text_type label_type surrogate two_forms empty_system no_user no_answer
same_role""")
