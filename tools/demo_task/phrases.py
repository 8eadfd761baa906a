"""What customers say, as clauses that decide one ticket field each. Knows no product and no file.

Every table has two halves: `train`, and `test`, whose clauses occur in no training row. The halves share
key words (a model cannot know that "broken" means damaged without having read it) but no clause.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Clauses:
    """Wordings for the training and for the test rows."""

    train: tuple[str, ...]
    test: tuple[str, ...]

    def half(self, test: bool) -> tuple[str, ...]:
        """One of the two."""
        return self.test if test else self.train


# {p} is the product
ISSUES: dict[str, Clauses] = {
    "damaged": Clauses(
        train=(
            "my {p} arrived broken",
            "the {p} came with a crack",
            "the {p} is damaged",
            "there is a big scratch on my {p}",
            "the {p} was broken in the box",
            "my new {p} has a dent",
            "the {p} I got is cracked",
            "my {p} came in pieces",
            "the box was crushed and the {p} is damaged",
            "I opened the box and the {p} was broken",
            "one side of the {p} is scratched",
            "the {p} got damaged on the way",
            "there is a crack in the {p}",
            "your {p} arrived with a hole in it",
            "the {p} has a broken corner",
            "I got a damaged {p}",
        ),
        test=(
            "the {p} I bought arrived damaged",
            "I found a crack in my {p}",
            "my {p} has scratches and a dent",
            "the {p} came out of the box broken",
            "the {p} that came today is damaged",
            "I see a big crack on the {p}",
        ),
    ),
    "late": Clauses(
        train=(
            "my {p} has not arrived yet",
            "I am still waiting for my {p}",
            "the {p} is late",
            "the {p} never came",
            "I have been waiting two weeks for the {p}",
            "the {p} should have been here on Monday",
            "my {p} is ten days late",
            "the {p} is still not here",
            "where is my {p}",
            "I have not received the {p}",
            "my {p} has been on its way for a month",
            "nobody has delivered the {p}",
            "the delivery of my {p} is late",
            "I do not have my {p} yet",
            "the {p} did not come last week",
            "it has been three weeks and no {p}",
        ),
        test=(
            "we are still waiting for the {p}",
            "the {p} has still not arrived",
            "I never received my {p}",
            "my {p} is two weeks late",
            "the delivery with the {p} never came",
            "I have not got my {p} yet",
        ),
    ),
    "wrong": Clauses(
        train=(
            "I ordered the {p} but got something else",
            "you sent the wrong {p}",
            "this is not the {p} I ordered",
            "I wanted the {p} and you sent another thing",
            "the {p} is the wrong colour",
            "the {p} has the wrong size",
            "I got a different thing and not the {p}",
            "the wrong {p} was in the box",
            "this {p} is not what I asked for",
            "you mixed up my {p} with another order",
            "the {p} is not the one in the picture",
            "I received the wrong {p}",
            "instead of the {p} there was something else in the box",
            "my {p} is a different model",
            "the {p} you sent is not the right one",
            "I asked for the {p} and got another one",
        ),
        test=(
            "I was sent the wrong {p}",
            "you sent something else and not the {p}",
            "the {p} in the box is not the one I ordered",
            "I asked for another colour of the {p} and this is wrong",
            "this is the wrong size of {p}",
            "I got a different model of the {p}",
        ),
    ),
    "faulty": Clauses(
        train=(
            "my {p} stopped working",
            "the {p} does not turn on",
            "the {p} makes a strange noise",
            "my {p} will not start",
            "the {p} does not work",
            "the {p} turns off all the time",
            "my {p} worked for a day and then stopped",
            "the {p} will not charge",
            "the {p} gets too hot",
            "there is no sound from my {p}",
            "my {p} keeps stopping",
            "the {p} does nothing at all",
            "since yesterday the {p} does not start",
            "the {p} no longer works",
            "I cannot get the {p} to work",
            "the {p} stops after a minute",
        ),
        test=(
            "my {p} does not work any more",
            "the {p} has stopped working",
            "the {p} I have will not turn on",
            "after a day my {p} does not start",
            "my {p} makes a noise and then stops",
            "the {p} keeps turning off",
        ),
    ),
    "incomplete": Clauses(
        train=(
            "a part of my {p} is missing",
            "the {p} came without its cable",
            "there are no screws with the {p}",
            "the {p} has no manual",
            "half of the {p} is missing",
            "the {p} is not complete",
            "my {p} came without a lid",
            "some parts of the {p} were not in the box",
            "the battery of the {p} is missing",
            "the {p} came without the plug",
            "I am missing a piece of the {p}",
            "there is a part missing from the {p}",
            "the {p} has only one of two handles",
            "the box of the {p} had no instructions",
            "my {p} is missing a wheel",
            "the {p} came with no cover",
        ),
        test=(
            "parts are missing from my {p}",
            "the {p} came without screws",
            "there is no cable with my {p}",
            "the {p} is missing its lid",
            "one piece of the {p} was not in the box",
            "my {p} is not complete and has no manual",
        ),
    ),
}

ACTIONS: dict[str, Clauses] = {
    "refund": Clauses(
        train=(
            "I want my money back",
            "please refund me",
            "I would like a refund",
            "can I get my money back",
            "give me my money back",
            "please pay the money back",
            "I ask for a full refund",
            "refund the order please",
            "I just want a refund",
            "a refund would be best",
            "please send the money back to my card",
            "I expect a refund",
        ),
        test=(
            "could I have a refund",
            "I would like my money back",
            "please give me a full refund",
            "I want you to refund the money",
        ),
    ),
    "replace": Clauses(
        train=(
            "please send a new one",
            "I would like a new one",
            "can you replace it",
            "please replace it",
            "I want another one",
            "send me a replacement please",
            "could I get a new one",
            "I need a replacement",
            "please exchange it",
            "can you send another one",
            "a new one would be fine",
            "I want to exchange it",
        ),
        test=(
            "could you send me a new one",
            "I would like a replacement",
            "please let me exchange it",
            "can I have another one",
        ),
    ),
    "repair": Clauses(
        train=(
            "can you repair it",
            "please fix it",
            "I would like to have it repaired",
            "can somebody fix it",
            "please repair it",
            "I want it fixed",
            "could you repair it for me",
            "is there someone who can fix it",
            "I need a repair",
            "please send someone to fix it",
            "can it be fixed",
            "a repair would be enough",
        ),
        test=(
            "could somebody repair it",
            "I would like you to fix it",
            "can I have it repaired",
            "I want a repair",
        ),
    ),
    "inform": Clauses(
        train=(
            "please tell me what to do",
            "can you tell me more",
            "please let me know what happens next",
            "what should I do now",
            "please keep me informed",
            "I would like to know why",
            "can you explain this",
            "please tell me what went wrong",
            "let me know what you find out",
            "I just want to know what happened",
            "please give me some information",
            "can you look into it and tell me",
        ),
        test=(
            "please tell me what happened",
            "can you let me know what to do",
            "I want to know what went wrong",
            "could you explain what happens next",
        ),
    ),
}

# the empty clause means that nothing was said about time: normal
URGENCIES: dict[str, Clauses] = {
    "high": Clauses(
        train=(
            "it is urgent",
            "I need it today",
            "please hurry",
            "as soon as possible please",
            "this cannot wait",
            "I need it by tomorrow",
            "I need an answer right now",
            "it is very urgent for me",
            "please be quick",
            "I have no time to lose",
            "answer at once please",
            "we need it this week",
        ),
        test=(
            "this is urgent",
            "please hurry because I need it tomorrow",
            "I need an answer today",
            "be quick please",
        ),
    ),
    "low": Clauses(
        train=(
            "there is no rush",
            "take your time",
            "it is not urgent",
            "no hurry",
            "whenever you have time",
            "I can wait",
            "next month is fine",
            "it can wait",
            "there is no need to hurry",
            "I am in no hurry",
            "any time is fine",
            "do it when you can",
        ),
        test=(
            "I am not in a hurry",
            "please take your time with it",
            "it can wait until next month",
            "there is no rush for me",
        ),
    ),
    "normal": Clauses(train=("",), test=("",)),
}

# {o} is the order number
ORDERS = Clauses(
    train=(
        "my order number is {o}",
        "order {o}",
        "the order is {o}",
        "it is order number {o}",
        "order number {o}",
        "this is about order {o}",
        "the number is {o}",
        "you can find it under {o}",
        "my order was {o}",
        "I ordered it under {o}",
        "the order number: {o}",
        "see order {o}",
        "it was order {o}",
        "I have order number {o}",
    ),
    test=(
        "this was order number {o}",
        "the order has the number {o}",
        "it is about order {o}",
        "my number is {o}",
    ),
)
GREETINGS = Clauses(
    train=(
        "",
        "",
        "",
        "Hello.",
        "Hi.",
        "Hi there.",
        "Hello there.",
        "Good morning.",
        "Good evening.",
        "Dear team.",
        "Hey.",
    ),
    test=("", "", "Good day.", "Hello team.", "Hi everyone."),
)
CLOSINGS = Clauses(
    train=("", "", "", "", "Thanks.", "Thank you.", "Best wishes.", "Bye.", "Many thanks."),
    test=("", "", "", "Thanks a lot.", "Thank you very much."),
)
