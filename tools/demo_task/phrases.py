"""What customers say, as clauses that decide one ticket field each. Knows no product and no file.

`[a|b]` stands for either wording. Every table has two halves: `train`, and `test`, whose clauses occur in no
training row. The halves share key words (a model cannot know that "broken" means damaged without having read
it) but no clause.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Clauses:
    """Wordings for the training and for the test rows."""

    train: tuple[str, ...]
    test: tuple[str, ...]

    def half(self, test: bool) -> tuple[str, ...]:
        """One of the two."""
        return self.test if test else self.train


def worded(pattern: str, rng: random.Random) -> str:
    """The pattern with one wording chosen at each `[a|b]`."""
    return re.sub(r"\[([^]]*)\]", lambda match: rng.choice(match[1].split("|")), pattern)


# {p} is the product
ISSUES: dict[str, Clauses] = {
    "damaged": Clauses(
        train=(
            "[my|the|our] {p} [arrived|came|was delivered] [broken|damaged|cracked|scratched]",
            "the {p} came with a [crack|dent|scratch|hole|broken corner]",
            "the {p} is [damaged|broken|cracked|scratched|bent]",
            "there is a [crack|dent|big scratch|hole] in [my|the|our] {p}",
            "the {p} was [broken|damaged|in pieces] in the box",
            "my new {p} has a [dent|crack|scratch|broken side]",
            "my {p} came in pieces",
            "the box was crushed and the {p} is [damaged|broken]",
            "I opened the box and the {p} was [broken|cracked|damaged]",
            "one [side|corner|part] of the {p} is [scratched|broken|bent|cracked]",
            "the {p} got [damaged|broken|scratched] on the way",
            "I [got|received] a [damaged|broken|scratched] {p}",
            "the {p} [I have|you sent|that came] is [broken|scratched|cracked]",
            "I [see|found] a [dent|hole|scratch] in the {p}",
            "[my|the] {p} has [dents|scratches|cracks]",
        ),
        test=(
            "the {p} I bought arrived damaged",
            "I found a crack in my {p}",
            "my {p} has scratches and a dent",
            "the {p} came broken in its box",
            "the {p} that came today is damaged",
            "there is a crack on one side of my {p}",
        ),
    ),
    "late": Clauses(
        train=(
            "[my|the|our] {p} has not [arrived|come] yet",
            "I am still waiting for [my|the|our] {p}",
            "[my|the] {p} is [very|too|much too] late",
            "[my|the|our] {p} never [came|arrived]",
            "I have been waiting [two weeks|three weeks|a month|ten days] for [my|the] {p}",
            "[my|the] {p} should have [been here|arrived|come] [on Monday|last week|days ago]",
            "my {p} is [ten days|three weeks|a month] late",
            "the {p} is still not here",
            "where is [my|the|our] {p}",
            "I have not [received|got|seen] the {p}",
            "nobody has [delivered|brought] [my|the] {p}",
            "the delivery of [my|the] {p} is [late|very late]",
            "I do not have [my|the] {p} yet",
            "the {p} did not [come|arrive] [last week|on Friday|yesterday]",
            "we waited and waited but the {p} did not [come|arrive]",
            "I never [got|saw] [my|the] {p}",
            "I have not got [the|our] {p}",
            "[my|the] {p} is a [week|month] late",
        ),
        test=(
            "we are still waiting for the {p}",
            "the {p} has still not arrived",
            "my {p} never arrived at all",
            "my {p} is two weeks late",
            "the delivery with the {p} never came",
            "I have not got my {p} yet",
        ),
    ),
    "wrong": Clauses(
        train=(
            "I ordered the {p} but [got|received] [something else|another thing]",
            "you sent [me|us] the wrong {p}",
            "this is not the {p} [I|we] ordered",
            "I wanted the {p} and you sent [something else|another one|another thing]",
            "the {p} is the wrong [colour|size|model|kind]",
            "the {p} has the wrong [size|colour|shape]",
            "I got a different [thing|colour|size] and not the {p}",
            "the wrong {p} was in the box",
            "this {p} is not what [I|we] [asked for|ordered|wanted]",
            "you mixed up my {p} with [another order|something else]",
            "the {p} is not the one [in the picture|I wanted|we chose]",
            "I [received|got] the wrong {p}",
            "instead of the {p} there was something else in the box",
            "my {p} is a different [model|colour|size]",
            "the {p} you sent is [not the right one|the wrong one]",
            "we asked for the {p} and got [another one|the wrong one]",
            "the [colour|model|shape] of [my|the] {p} is wrong",
            "you sent another [model|size|colour] and not the {p}",
            "I was given the wrong {p}",
        ),
        test=(
            "I was sent the wrong {p}",
            "you sent something else and not the {p}",
            "the {p} in the box is not the one I ordered",
            "I asked for the {p} and got something else",
            "the size of the {p} is wrong",
            "I got a different model of the {p}",
        ),
    ),
    "faulty": Clauses(
        train=(
            "[my|the|our] {p} stopped working [yesterday|today|last night|after a week]",
            "the {p} does not [turn on|start|work|charge]",
            "the {p} makes a [strange|loud|bad] noise",
            "[my|our] {p} will not [start|charge|work|switch on]",
            "the {p} turns off [all the time|again and again|by itself]",
            "my {p} worked for a [day|week|month] and then stopped",
            "the {p} gets too hot",
            "there is no [sound|light|power] from my {p}",
            "my {p} keeps [stopping|making a noise]",
            "the {p} does nothing at all",
            "since [yesterday|Monday|last week] the {p} does not [start|work|turn on]",
            "[my|the] {p} no longer [works|starts|charges|turns on]",
            "I cannot get the {p} to [work|start|turn on]",
            "the {p} [stops|turns off] after a minute",
            "the {p} keeps [turning on|starting again]",
            "[my|the] {p} has stopped",
            "after a [week|month] the {p} [does not start|will not turn on]",
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
            "a [part|piece|screw|handle] of [my|the] {p} is missing",
            "the {p} came without [its|the|a] [cable|lid|cover|plug|battery]",
            "there are no [screws|cables|instructions|handles] with the {p}",
            "[my|the] {p} has no [manual|lid|cable|cover]",
            "half of the {p} is missing",
            "the {p} is not complete",
            "some [parts|pieces|screws] of the {p} were [missing|not in the box]",
            "the [battery|cable|lid|manual] of the {p} is missing",
            "I am missing [a piece|a part|the lid|the cable] of the {p}",
            "there is a [part|piece|screw] missing from the {p}",
            "the {p} has only one of two [handles|parts|screws]",
            "the box of the {p} had no [instructions|manual|screws]",
            "my {p} is missing [a wheel|a part|its cover|its battery]",
            "the {p} came with no [cover|screws|manual]",
            "there is no [lid|plug|manual] with [my|the] {p}",
            "the {p} is missing its [battery|cover|cable]",
            "parts of [the|our] {p} are missing",
            "one [part|handle] of [my|the] {p} was not [there|in it]",
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
            "please refund [me|us|the order|it|the price]",
            "[I|we] would like a [full refund|refund]",
            "can [I|we] get [my|the|our] money back",
            "give me [my|the] money back",
            "please [pay|send|give] the money back",
            "[I|we] ask for a [full refund|refund]",
            "I just want a refund",
            "a refund would be [best|fine|good]",
            "please send the money back to my card",
            "[I|we] expect a [full refund|refund]",
            "can you refund [me|it|the money]",
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
            "please send [me|us] [a new one|another one|a replacement]",
            "[I|we] would like [a new one|another one]",
            "can you [replace|exchange] it",
            "please [replace|exchange] it",
            "[I|we] want [another one|a new one|a replacement]",
            "send me a replacement please",
            "could I get [a new one|a replacement]",
            "[I|we] need [a replacement|a new one]",
            "can you send [another one|a new one]",
            "a [new one|replacement] would be [fine|best|good]",
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
            "can you [repair|fix] it",
            "please [fix|repair] it [for me|for us|soon]",
            "I would like to have it [repaired|fixed]",
            "can somebody [fix|repair] it",
            "[I|we] want it [fixed|repaired]",
            "could you [repair|fix] it for me",
            "is there someone who can [fix|repair] it",
            "[I|we] need a repair",
            "please send someone to [fix|repair] it",
            "can it be [fixed|repaired]",
            "a repair would be [enough|fine|best]",
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
            "please tell [me|us] [what to do|what went wrong|why|more]",
            "can you tell [me|us] [more|what happened|what to do|why]",
            "please let [me|us] know what happens [next|now]",
            "what should [I|we] do now",
            "please keep [me|us] informed",
            "[I|we] would like to know [why|what happened|more]",
            "can you explain [this|it|what happened]",
            "let me know what [you find out|happened|to do]",
            "I just want to know [what happened|why]",
            "please [give|send] me some information",
            "can you look into it and tell me",
            "please explain [this|what happened|what went wrong]",
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
            "it is [urgent|very urgent|really urgent]",
            "[I|we] need it [today|tomorrow|this week|right now|soon]",
            "please [hurry|hurry up|be quick|be fast]",
            "as [soon|fast] as possible please",
            "this cannot wait",
            "[I|we] need it by [tomorrow|Monday|Friday|tonight]",
            "[I|we] need [an answer|help] [right now|tomorrow|this week|at once]",
            "this is very urgent [for me|for us]",
            "I have no time to lose",
            "[answer|do it|help me] [today|at once|right now|quickly] please",
            "I am in a [big|great] hurry",
            "I cannot wait [any longer|another day|for weeks]",
            "[hurry|be quick] because I need it [soon|this week|tonight]",
            "this is [really|so] urgent",
            "I need [it|help] today",
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
            "there is no [rush|hurry]",
            "[take|you can take] your time",
            "it is not [urgent|very urgent|so urgent]",
            "no [hurry|rush]",
            "whenever you have [time|a moment]",
            "[I|we] can wait",
            "next [month|week|year] is [fine|early enough]",
            "it can wait [a week|a month|a while]",
            "there is no need to [hurry|rush]",
            "[I am|we are] in no [hurry|rush]",
            "any time is [fine|good]",
            "do it when you [can|have time]",
            "you do not have to hurry",
            "I am not in a [rush|hurry]",
            "[please take|take all] the time you need",
            "it can wait until [summer|Monday|next year]",
            "I do not need it [soon|right now|this month]",
        ),
        test=(
            "there is no need to hurry with this",
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
        "[my|the|our] order number is {o}",
        "order {o}",
        "[my|the|our] order is {o}",
        "it is order number {o}",
        "order number {o}",
        "this is about order {o}",
        "the number is {o}",
        "you can find it under {o}",
        "[my|the] order was {o}",
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
    train=(
        "",
        "",
        "",
        "",
        "Thanks.",
        "Thank you.",
        "Best wishes.",
        "Bye.",
        "Many thanks.",
        "Thank you very much.",
    ),
    test=("", "", "", "Kind regards.", "Thanks a lot."),
)
