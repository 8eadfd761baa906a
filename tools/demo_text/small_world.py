"""A small world of people, things and places: stories, questions and small talk. Knows no JSON."""

# ruff: noqa: SIM905 (word lists are easier to read as text)

from __future__ import annotations

from demo_text.document import Document, Turn, plain, task
from demo_text.words import WordSource

PEOPLE = (
    "Tom Mia Ben Lily Sam Anna Max Sue Tim Lucy Jack Zoe Leo Ella Finn Rosa Omar Nina Kofi Maya Raj "
    "Lena Hugo Amy"
).split()
THINGS = (
    "ball book cup key hat box apple lamp coat drum kite bell spoon stone letter basket ring map bag cake"
).split()
PLACES = (
    "kitchen garden park school shop river forest barn library hall attic market station beach house tower"
).split()
FEELINGS = ("happy", "sad", "tired", "proud", "hungry", "cold", "scared", "brave")
MOVES = ("went to", "walked to", "ran to", "moved to", "came to")
TAKES = ("took", "picked up", "found", "got")

HELPERS = (
    "You are a friendly helper.",
    "You are a helpful assistant.",
    "Answer in short sentences.",
    "Be kind and brief.",
    "You are a helpful assistant for children.",
)


def _who(words: WordSource) -> str:
    return words.rng.choice(PEOPLE) if words.rng.random() < 0.5 else words.name()


def _what(words: WordSource) -> str:
    return words.rng.choice(THINGS) if words.rng.random() < 0.5 else words.thing().lower()


def _where(words: WordSource) -> str:
    return words.rng.choice(PLACES) if words.rng.random() < 0.6 else words.word().lower()


def where_is(words: WordSource) -> Document:
    """People move about and carry things; asked is where somebody or something is."""
    rng = words.rng
    people = list(dict.fromkeys(_who(words) for _ in range(rng.randint(1, 3))))
    place: dict[str, str] = {}
    held: dict[str, str] = {}
    lines = []
    for _ in range(rng.randint(2, 7)):
        who = rng.choice(people)
        if who not in place or rng.random() < 0.55:
            place[who] = _where(words)
            lines.append(f"{who} {rng.choice(MOVES)} the {place[who]}.")
        else:
            thing = _what(words)
            held[thing] = who
            lines.append(f"{who} {rng.choice(TAKES)} the {thing}.")
    questions = [(f"Where is {who}?", there) for who, there in place.items()]
    for thing, who in held.items():
        questions += [(f"Who has the {thing}?", who), (f"Where is the {thing}?", place[who])]
    ask, answer = rng.choice(questions)
    text = " ".join(lines)
    if rng.random() < 0.4:
        answer = f"The {answer}." if ask.startswith("Where") else f"{answer} has it."
    return task(
        f"{text} {ask}" if rng.random() < 0.5 else f"{text}\n{ask}", answer, learn_question=rng.random() < 0.3
    )


def facts(words: WordSource) -> Document:
    """Invented facts about people and a question on one of them."""
    rng = words.rng
    rows: list[tuple[str, str, str]] = []
    for _ in range(rng.randint(2, 5)):
        who = _who(words)
        kind = rng.randrange(5)
        if kind == 0:
            value = words.word().lower()
            rows.append((f"{who} likes {value}.", f"What does {who} like?", value))
        elif kind == 1:
            value = words.name()
            rows.append((f"{who} lives in {value}.", f"Where does {who} live?", value))
        elif kind == 2:
            value = str(rng.randint(2, 99))
            rows.append((f"{who} is {value} years old.", f"How old is {who}?", value))
        elif kind == 3:
            value = _what(words)
            rows.append((f"{who} has a {value}.", f"What does {who} have?", value))
        else:
            value = words.name()
            rows.append((f"The friend of {who} is {value}.", f"Who is the friend of {who}?", value))
    text = " ".join(row[0] for row in rows)
    subjects = [row[1] for row in rows]
    unique = [row for row in rows if subjects.count(row[1]) == 1] or rows[-1:]
    _, ask, answer = rng.choice(unique)
    if len(unique) == 1 and subjects.count(ask) > 1:
        text, ask, answer = rows[-1]
    return task(f"{text}\n{ask}", answer)


def story(words: WordSource) -> Document:
    """A few sentences in which one name and one thing come back again and again."""
    rng = words.rng
    who, friend, thing, where = _who(words), _who(words), _what(words), _where(words)
    feeling, later = rng.sample(FEELINGS, k=2)
    openings = (
        f"Once there was a child named {who}.",
        f"{who} lived near the {where}.",
        f"One day, {who} went to the {where}.",
        f"There was once a small {thing}. It belonged to {who}.",
    )
    middles = (
        f"{who} had a {thing} and loved it very much.",
        f"{who} saw a {thing} in the {where}.",
        f'"Look at the {thing}!" said {who}.',
        f"{who} felt {feeling} and sat down.",
        f'{friend} came along and asked, "Is that your {thing}?"',
        f'"Yes, it is my {thing}," said {who}.',
        f"They played with the {thing} all day.",
        f"Then the {thing} was gone. {who} looked for it in the {where}.",
        f'{friend} called, "{who}! Here is your {thing}!"',
        f"{who} gave the {thing} to {friend}.",
    )
    endings = (
        f"{who} was {later} and went home with the {thing}.",
        f"So {who} and {friend} became friends.",
        f"From that day on, {who} always kept the {thing} safe.",
        f"And {friend} was {later} too.",
    )
    chosen = sorted(rng.sample(range(len(middles)), k=rng.randint(2, 6)))
    parts = [rng.choice(openings), *(middles[i] for i in chosen), rng.choice(endings)]
    text = " ".join(parts)
    if rng.random() < 0.5:
        return plain(text)
    asks = (
        (f"Who had the {thing}?", who),
        ("Who is the story about?", who),
        ("What is the story about?", f"a {thing}"),
    )
    ask, answer = rng.choice(asks)
    return (Turn("user", f"{text}\n{ask}"), Turn("assistant", answer))


def introduce(words: WordSource) -> Document:
    """Somebody says a name or a like and asks for it again later."""
    rng = words.rng
    name, thing = words.name(), words.word().lower()
    said, fact, ask, answer = rng.choice(
        (
            (
                f"Hi, my name is {name}.",
                f"Hello {name}! Nice to meet you.",
                "What is my name?",
                f"Your name is {name}.",
            ),
            (
                f"I am {name}.",
                f"Hi {name}, how can I help?",
                "Do you remember my name?",
                f"Yes, you are {name}.",
            ),
            (
                f"I like {thing}.",
                f"{thing.capitalize()} sounds nice!",
                "What do I like?",
                f"You like {thing}.",
            ),
            (
                f"I have a pet {thing}.",
                f"A {thing}! How lovely.",
                "What pet do I have?",
                f"You have a {thing}.",
            ),
            (
                f"My favourite word is {thing}.",
                "That is a fine word.",
                "Which word was it?",
                f"It was {thing}.",
            ),
        )
    )
    turns = [Turn("user", said, False), Turn("assistant", fact)]
    if rng.random() < 0.4:
        small = rng.choice(
            (("How are you?", "I am fine, thank you."), ("Thanks!", "You are welcome."), ("Okay.", "Good."))
        )
        turns += [Turn("user", small[0]), Turn("assistant", small[1])]
    turns += [Turn("user", ask), Turn("assistant", answer)]
    if rng.random() < 0.4:
        turns.insert(0, Turn("system", rng.choice(HELPERS)))
    return tuple(turns)


def system_rule(words: WordSource) -> Document:
    """The system prompt says how to answer, and the answer keeps to it."""
    rng = words.rng
    word, said = words.word(), " ".join(words.words(1, 6))
    system, answer = rng.choice(
        (
            (f"Always answer with {word}.", word),
            (f"Whatever is said, reply: {word}", word),
            ("Repeat what the user says.", said),
            (f"Repeat what the user says and add {word}.", f"{said} {word}"),
            (f"Start each answer with {word}: and repeat the user.", f"{word}: {said}"),
            (f"Your name is {word}. Greet the user by saying your name.", f"Hello, I am {word}."),
            ("Answer with the last word only.", said.split()[-1]),
            ("Answer with the first word only.", said.split()[0]),
        )
    )
    return task(said, answer, system=system)
