"""Records with random keys and values: message to JSON, JSON to value, JSON to text, labels.

Schemas are drawn at random for every document. Knows nothing of the demo task's ticket schema:
none of its five keys is in `record_tables`, and a test holds that.
"""

from __future__ import annotations

import json
import random

from demo_text.document import Document, task
from demo_text.record_tables import LABELS, PHRASES
from demo_text.words import WordSource, pseudo_word

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "today", "tomorrow")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink", "grey", "orange", "purple")
ASK = (
    "Make JSON with {keys}: {m}",
    "{m}\nGive {keys} as JSON.",
    "Extract {keys} as JSON.\n{m}",
    "{m}\nJSON with {keys}:",
    "Read the message and write JSON with the keys {keys}.\n{m}",
    "Fill in {keys}.\nMessage: {m}",
)
SYSTEMS = (
    "Extract {keys} as JSON.",
    "You turn messages into JSON with {keys}.",
    "Answer with JSON: {keys}.",
    "JSON only. Keys: {keys}.",
)
OPENERS = (
    "Hello, ",
    "Hi, ",
    "Hey. ",
    "Good morning, ",
    "Well, ",
    "So ",
    "Please note: ",
    "Dear all, ",
    "",
    "",
    "",
    "",
    "",
)
CLOSERS = (" Thanks.", " Thank you.", " Bye.", " That is all.", " See you.", "", "", "", "", "")


def value_for(key: str, words: WordSource) -> str:
    """A random value of the kind that `key` calls for."""
    rng = words.rng
    if key in ("code", "reference"):
        return words.code()
    if key in ("name", "person", "city", "team"):
        return words.name()
    if key == "number":
        return words.number()
    if key == "room":
        return rng.choice((words.number(), words.code()))
    if key == "day":
        return rng.choice(DAYS)
    if key == "time":
        return f"{rng.randint(1, 12)}:{rng.choice(('00', '15', '30', '45'))}"
    if key == "price":
        return rng.choice((f"{rng.randint(1, 99)}.{rng.randint(10, 99)}", f"${rng.randint(1, 900)}"))
    if key == "phone":
        return "".join(rng.choices("0123456789", k=rng.randint(6, 9)))
    if key == "colour":
        return rng.choice(COLOURS) if rng.random() < 0.5 else pseudo_word(rng)
    return words.thing()


def _join(parts: list[str], rng: random.Random) -> str:
    out = ""
    for i, part in enumerate(parts):
        if i == 0:
            out = part
        else:
            glue = rng.choice((". ", ". ", ", ", " and ", ", and ", "; ", " - "))
            out += glue + (part[0].upper() + part[1:] if glue == ". " else part)
    return out


def _dump(record: dict[str, str], rng: random.Random) -> str:
    if rng.random() < 0.75:
        return json.dumps(record, separators=(",", ":"), ensure_ascii=False)
    return json.dumps(record, ensure_ascii=False)


def _frame(keys: list[str], message: str, answer: str, rng: random.Random) -> Document:
    listed = ", ".join(keys)
    if rng.random() < 0.5:
        return task(message, answer, system=rng.choice(SYSTEMS).format(keys=listed))
    return task(rng.choice(ASK).format(keys=listed, m=message), answer)


def message_to_json(words: WordSource) -> Document:
    """An everyday message in, the asked-for fields out, copied or classified, in the asked-for order."""
    rng = words.rng
    copied = rng.sample(list(PHRASES), k=rng.randint(1, 4))
    labelled = rng.sample(list(LABELS), k=rng.choice((0, 0, 1, 1, 2)))
    record: dict[str, str] = {}
    parts = []
    for key in copied:
        record[key] = value_for(key, words)
        parts.append(rng.choice(PHRASES[key]).format(v=record[key]))
    for key in labelled:
        label = rng.choice(list(LABELS[key]))
        record[key] = label
        parts.append(rng.choice(LABELS[key][label]))
    rng.shuffle(parts)
    if rng.random() < 0.3:
        parts.insert(rng.randrange(len(parts) + 1), filler(words))
    body = _join(parts, rng)
    opener = rng.choice(OPENERS)
    body = opener + (body if opener.endswith(", ") or opener == "So " else body[0].upper() + body[1:])
    message = body + rng.choice((".", ".", "!", "")) + rng.choice(CLOSERS)
    keys = list(record)
    if rng.random() < 0.4:
        keys = rng.sample(keys, k=rng.randint(1, len(keys)))
    rng.shuffle(keys)
    return _frame(keys, message, _dump({key: record[key] for key in keys}, rng), rng)


def filler(words: WordSource) -> str:
    """A clause that gives no field away."""
    return words.rng.choice(
        (
            "I hope you are well",
            "we came by train",
            f"the {words.word()} was closed",
            "it was a long day",
            f"my friend {words.name()} told me about you",
            "I am new here",
            "I tried it twice",
            "we waited for an hour",
            f"I had {words.rng.randint(2, 9)} of those before",
            "that is the second time",
            "it used to be fine",
        )
    )


def random_record(words: WordSource) -> dict[str, str]:
    """Random keys (known or invented words) with random values."""
    rng = words.rng
    return {
        (rng.choice(list(PHRASES)) if rng.random() < 0.3 else words.word().lower()): words.value()
        for _ in range(rng.randint(1, 6))
    }


def text_to_json(words: WordSource) -> Document:
    """`key: value` lines or sentences with invented keys to JSON."""
    rng = words.rng
    record = random_record(words)
    shape = rng.choice(("{k}: {v}", "{k} = {v}", "the {k} is {v}", "{k} {v}", "{v} is the {k}", "{k} -> {v}"))
    text = rng.choice(("\n", ", ", "; ", ". ")).join(shape.format(k=k, v=v) for k, v in record.items())
    keys = list(record)
    if rng.random() < 0.5:
        rng.shuffle(keys)
    if rng.random() < 0.3:
        keys = keys[: rng.randint(1, len(keys))]
    return _frame(keys, text, _dump({key: record[key] for key in keys}, rng), rng)


def json_lookup(words: WordSource) -> Document:
    """JSON in; one value, one key, all keys, or lines out."""
    rng = words.rng
    record = random_record(words)
    text = _dump(record, rng)
    key, value = rng.choice(list(record.items()))
    asks = (
        (f"What is {key}?", value),
        (f"Give the value of {key}.", value),
        (f"Which key has {value}?", next(k for k, v in record.items() if v == value)),
        ("List the keys.", ", ".join(record)),
        ("List the values.", ", ".join(record.values())),
        ("Write it as lines.", "\n".join(f"{k}: {v}" for k, v in record.items())),
        (f"Leave out {key}.", _dump({k: v for k, v in record.items() if k != key}, random.Random(1))),
    )
    ask, answer = rng.choice(asks)
    return task(f"{text}\n{ask}" if rng.random() < 0.7 else f"{ask}\n{text}", answer)


def find_in_message(words: WordSource) -> Document:
    """An everyday message in, one value out, asked for by name."""
    rng = words.rng
    keys = rng.sample(list(PHRASES), k=rng.randint(1, 4))
    values = {key: value_for(key, words) for key in keys}
    message = _join([rng.choice(PHRASES[key]).format(v=values[key]) for key in keys], rng)
    message = message[0].upper() + message[1:] + "."
    key = rng.choice(keys)
    ask = rng.choice(
        ("What is the {k}?", "Which {k}?", "Find the {k}.", "The {k}?", "Give only the {k}.")
    ).format(k=key)
    if rng.random() < 0.25:
        return task(message, values[key], system=ask)
    return task(f"{message}\n{ask}" if rng.random() < 0.7 else f"{ask}\n{message}", values[key])


def choose_label(words: WordSource) -> Document:
    """Say which of the listed labels fits a message."""
    rng = words.rng
    field = rng.choice(list(LABELS))
    label = rng.choice(list(LABELS[field]))
    said = rng.choice(LABELS[field][label])
    parts = [said] if rng.random() < 0.5 else rng.sample([said, filler(words)], k=2)
    message = _join(parts, rng)
    message = message[0].upper() + message[1:] + "."
    options = list(LABELS[field])
    rng.shuffle(options)
    ask = rng.choice(("Choose one: {o}.", "Which is it: {o}?", f"What is the {field}? {{o}}")).format(
        o=", ".join(options)
    )
    if rng.random() < 0.4:
        return task(message, label, system=ask)
    return task(f"{message}\n{ask}", label)
