"""Tasks on lists and sentences: repeat, reverse, sort, pick, count, replace, spell. Knows no tokens."""

from __future__ import annotations

import random

from demo_text.document import Document, Turn, plain, task
from demo_text.words import WordSource

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
SEPARATORS = (" ", " ", ", ", ", ", "\n", " - ", "; ", " | ")
REPEAT = (
    "Repeat after me: {x}",
    "Say this again: {x}",
    "Copy this: {x}",
    "Please repeat: {x}",
    "Write exactly this: {x}",
    "Echo: {x}",
    "{x}\nRepeat the line above.",
    "{x}\nCopy it.",
    'Say "{x}".',
    "Can you say {x}?",
    "Repeat this\n{x}",
    "Type the following text without any change.\n{x}",
    "What did I just say? {x}",
    "Read this back to me: {x}",
)


def _items(words: WordSource, low: int = 2, high: int = 9) -> tuple[list[str], str]:
    rng = words.rng
    kind = rng.random()
    if kind < 0.6:
        items = words.words(low, high)
    elif kind < 0.75:
        items = list(dict.fromkeys(words.number() for _ in range(rng.randint(low, high))))
    elif kind < 0.9:
        items = list(dict.fromkeys(words.code() for _ in range(rng.randint(low, high))))
    else:
        items = list(dict.fromkeys(words.name() for _ in range(rng.randint(low, high))))
    return items, rng.choice(SEPARATORS)


def repeat(words: WordSource) -> Document:
    """Say the same thing again, exactly."""
    items, separator = _items(words, 1, 14)
    text = separator.join(items)
    return task(words.rng.choice(REPEAT).format(x=text), text)


def repeated_lines(words: WordSource) -> Document:
    """A block of random words two to four times over; only the repetitions are learnt."""
    items, separator = _items(words, 4, 28)
    block = separator.join(items)
    glue = words.rng.choice(("\n", " ", "\n\n", ". ", " / "))
    rest = (glue + block) * words.rng.choice((1, 1, 2, 3))
    return (Turn("text", block, False), Turn("text", rest))


def reverse(words: WordSource) -> Document:
    """The list from the end to the beginning."""
    items, separator = _items(words, 2, 6)
    ask = words.rng.choice(
        (
            "Reverse this list: {x}",
            "Say it backwards: {x}",
            "Turn the order around: {x}",
            "{x}\nReverse the order.",
        )
    )
    return task(ask.format(x=separator.join(items)), separator.join(reversed(items)))


def sort(words: WordSource) -> Document:
    """Alphabetical order."""
    items = words.words(2, 6)
    separator = words.rng.choice(SEPARATORS)
    ask = words.rng.choice(
        ("Sort these words: {x}", "Put in alphabetical order: {x}", "{x}\nSort from A to Z.")
    )
    return task(ask.format(x=separator.join(items)), separator.join(sorted(items, key=str.lower)))


def pick(words: WordSource) -> Document:
    """The n-th or the last item, or the one before or after another."""
    items, separator = _items(words, 2, 7)
    rng = words.rng
    at = rng.randrange(len(items))
    kind = rng.randrange(4)
    text = separator.join(items)
    if kind == 0 and at + 1 < len(items):
        return task(f"{text}\nWhich comes after {items[at]}?", items[at + 1])
    if kind == 1 and at > 0:
        return task(f"{text}\nWhich comes before {items[at]}?", items[at - 1])
    if kind == 2:
        return task(
            rng.choice(("What is the last item? {x}", "Give me the last one: {x}")).format(x=text), items[-1]
        )
    where = ORDINALS[at]
    ask = rng.choice(("What is the {o} item? {x}", "Give me the {o} word: {x}", "{x}\nWhich one is {o}?"))
    return task(ask.format(o=where, x=text), items[at])


def count(words: WordSource) -> Document:
    """How many items there are, or whether one is in the list."""
    items, separator = _items(words, 2, 9)
    rng = words.rng
    text = separator.join(items)
    if rng.random() < 0.5:
        return task(f"How many items? {text}", str(len(items)))
    wanted = rng.choice(items) if rng.random() < 0.5 else words.word()
    ask = rng.choice(("Is {w} in this list? {x}", "{x}\nDoes the list have {w}? Answer yes or no."))
    return task(ask.format(w=wanted, x=text), "yes" if wanted in items else "no")


def reformat(words: WordSource) -> Document:
    """The same items in another shape: commas, lines, bullets, numbers, capitals."""
    items, separator = _items(words, 2, 7)
    rng = words.rng
    text = separator.join(items)
    shapes = (
        ("Join with commas: {x}", ", ".join(items)),
        ("One item per line: {x}", "\n".join(items)),
        ("Make a bullet list: {x}", "\n".join(f"- {item}" for item in items)),
        ("Make a numbered list: {x}", "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))),
        ("Write in capital letters: {x}", text.upper()),
        ("Write in lower case: {x}", text.lower()),
        ("Put each item in quotes: {x}", separator.join(f'"{item}"' for item in items)),
        ("Make a JSON list: {x}", "[" + ",".join(f'"{item}"' for item in items) + "]"),
        ("Put each item in brackets: {x}", separator.join(f"({item})" for item in items)),
    )
    ask, answer = rng.choice(shapes)
    return task(ask.format(x=text), answer)


def replace(words: WordSource) -> Document:
    """Put one word in the place of another, or leave one out."""
    items = words.words(3, 8)
    rng = words.rng
    old, new = rng.choice(items), words.word()
    text = " ".join(items)
    if rng.random() < 0.35:
        return task(f"Leave out {old}: {text}", " ".join(item for item in items if item != old))
    ask = rng.choice(
        ("Replace {o} with {n}: {x}", "Change {o} to {n}.\n{x}", "{x}\nPut {n} in place of {o}.")
    )
    answer = " ".join(new if item == old else item for item in items)
    return task(ask.format(o=old, n=new, x=text), answer)


def spell(words: WordSource) -> Document:
    """A word letter by letter, or letters to a word."""
    word = words.word()
    if words.rng.random() < 0.6:
        return task(words.rng.choice(("Spell {w}.", "Spell the word {w}.")).format(w=word), "-".join(word))
    return task(f"What word is this? {'-'.join(word)}", word)


def marked(words: WordSource) -> Document:
    """The part of a text inside quotes, brackets or after a colon."""
    rng = words.rng
    before, inside, after = " ".join(words.words(1, 5)), words.value(), " ".join(words.words(1, 5))
    name, left, right = rng.choice(
        (("quotes", '"', '"'), ("brackets", "(", ")"), ("stars", "*", "*"), ("square brackets", "[", "]"))
    )
    return task(f"What is in {name}? {before} {left}{inside}{right} {after}", inside)


def code_words(words: WordSource) -> Document:
    """A made-up dictionary in the system prompt or the question, and a look-up or a translation."""
    rng = words.rng
    keys, values = words.words(2, 6), [words.value() for _ in range(6)]
    pairs = list(zip(keys, values, strict=False))
    glue = rng.choice((" means ", " = ", ": ", " -> ", " is "))
    table = rng.choice(("\n", ", ", "; ")).join(k + glue + v for k, v in pairs)
    if rng.random() < 0.6:
        key, value = rng.choice(pairs)
        ask = rng.choice(
            ("What is {k}?", "{k}?", "Look up {k}.", "Tell me {k}.", "What does {k} mean?")
        ).format(k=key)
        answer = value
    else:
        chosen = rng.sample(pairs, k=rng.randint(1, len(pairs)))
        ask = "Translate: " + " ".join(k for k, _ in chosen)
        answer = " ".join(v for _, v in chosen)
    if rng.random() < 0.4:
        return task(ask, answer, system=table)
    return task(f"{table}\n{ask}" if rng.random() < 0.7 else f"{ask}\n{table}", answer)


def pairs_text(words: WordSource) -> Document:
    """Plain lines `key value` in random order, each key told twice: recall without a question."""
    rng = words.rng
    pairs = [(key, words.value()) for key in words.words(3, 10)]
    glue = rng.choice((" ", ": ", " = ", " is ", ","))
    first = "\n".join(k + glue + v for k, v in pairs)
    again = pairs[:]
    rng.shuffle(again)
    turns = [Turn("text", first, False)]
    for key, value in again:
        turns += [Turn("text", f"\n{key}", False), Turn("text", glue + value)]
    return tuple(turns)


def sequence(rng: random.Random) -> Document:
    """Counting and simple sums."""
    kind = rng.randrange(3)
    if kind == 0:
        start, step = rng.randrange(1, 60), rng.choice((1, 1, 1, 2, 3, 5, 10))
        return plain(" ".join(str(start + step * i) for i in range(rng.randint(5, 14))))
    a, b = rng.randrange(0, 30), rng.randrange(0, 30)
    if kind == 1:
        return task(rng.choice((f"What is {a} + {b}?", f"Add {a} and {b}.", f"{a} plus {b}?")), str(a + b))
    a, b = max(a, b), min(a, b)
    return task(rng.choice((f"What is {a} - {b}?", f"Take {b} from {a}.", f"{a} minus {b}?")), str(a - b))
