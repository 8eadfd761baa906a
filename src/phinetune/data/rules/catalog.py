"""Every rule there is: the one list, from which pages and commands are made."""

from __future__ import annotations

from phinetune.data.findings import Severity
from phinetune.data.rules import (
    answers,
    balance,
    clusters,
    duplicates,
    encoding,
    judged,
    language,
    leaks,
    lengths,
    markup,
    private,
    stereotypes,
)
from phinetune.data.rules.base import Rule

_OF_FILES = ("missing", "is_folder", "no_file", "empty", "unreadable", "damaged", "columns")


def _reading(id: str, meaning: str, fix: str, severity: Severity = "error", can_clean: str = "") -> Rule:
    is_row = severity == "error" and id not in _OF_FILES
    return Rule(
        id=id,
        severity=severity,
        meaning=meaning,
        fix=fix,
        can_clean=can_clean or ("the row is left out and listed" if is_row else ""),
    )


_CORRECT = "correct the row; data clean leaves it out and lists it"
# What reading itself finds: the row cannot be had, or not as it was meant.
READING: tuple[Rule, ...] = (
    _reading("missing", "there is no such file", "check the path"),
    _reading("is_folder", "a folder was named, not a file", "name the file"),
    _reading("no_file", "this is not a regular file", "copy the data into a file"),
    _reading("empty", "the file holds nothing", "put examples into it"),
    _reading(
        "unreadable", "the file cannot be opened or unpacked", "check permissions; install what is named"
    ),
    _reading("damaged", "a packed file is cut short or broken", "copy it again"),
    _reading("encoding", "bytes are not of the file's encoding", "save the file as UTF-8"),
    _reading("json", "the row is not JSON", _CORRECT),
    _reading("duplicate_key", "a key stands twice in one object; Python silently keeps the last", _CORRECT),
    _reading("not_finite", "NaN and Infinity are not JSON", _CORRECT),
    _reading("nesting", "the row is nested too deeply to be read", _CORRECT),
    _reading("number", "a number is too long to be read", _CORRECT),
    _reading("too_long", "a row of more than 64 MiB", "split it into several"),
    _reading("columns", "the first line of a table does not name its columns", "name each column once"),
    _reading("table", "a row of a table does not fit its columns", "put text with separators into quotes"),
    _reading("not_an_object", "a row must be an object", _CORRECT),
    _reading("no_messages", "the row has no form that is known", "name its columns with --map"),
    _reading("two_forms", "a row has messages or text, not both", _CORRECT),
    _reading(
        "preference_pair",
        "preference pairs are data for another kind of training",
        "data convert --keep preferred",
    ),
    _reading("messages_type", "messages must be a list", _CORRECT),
    _reading("no_turns", "the conversation is empty", _CORRECT),
    _reading("message_type", "a message must be an object", _CORRECT),
    _reading("no_role", "a message says not who speaks", _CORRECT),
    _reading("role", "a role is unknown", "write system, user or assistant"),
    _reading("no_content", "a message has no content", _CORRECT),
    _reading("content_type", "content must be text; images and audio are not supported", _CORRECT),
    _reading("empty_content", "a turn is empty or blank", _CORRECT),
    _reading("weight", "a weight is not 0 or 1, or stands at the wrong turn", _CORRECT),
    _reading("tools", "tool calls cannot be trained as they are", "data convert --tools text"),
    _reading("system_order", "a system message comes late or twice", "put one in front"),
    _reading("no_assistant", "no assistant turn: nothing to train", _CORRECT),
    _reading("all_weights_0", "every answer has weight 0: nothing is trained", _CORRECT),
    _reading("label_type", "a label is empty or no name", _CORRECT),
    _reading("text_type", "text must be text", _CORRECT),
    _reading("empty_text", "the text is empty", _CORRECT),
    _reading("surrogate", "half of a character, which has no UTF-8 form", _CORRECT),
    _reading(
        "unknown_key",
        "a key is not used; near a known name it is an error",
        "delete or correct it",
        "warning",
    ),
    _reading(
        "empty_system", "the system message is empty", "write it or leave it out", "warning", "it is left out"
    ),
    _reading("no_user", "no user turn", "check that the question is not missing", "warning"),
    _reading("no_answer", "the last turn has no answer", "add it", "warning"),
    _reading("same_role", "two turns of one role in a row", "join them if they belong together", "warning"),
    _reading("control_text", "control tokens written as letters", "write turns as messages", "warning"),
    _reading(
        "lost_character",
        "U+FFFD stands for a character lost in a conversion",
        "take the source again",
        "warning",
    ),
)
LOOKING: tuple[Rule, ...] = (
    encoding.MOJIBAKE,
    markup.MARKUP,
    answers.BOILERPLATE,
    answers.REFUSAL,
    language.LANGUAGE,
    duplicates.DUPLICATE,
    duplicates.NEAR_DUPLICATE,
    duplicates.CONFLICT,
    duplicates.SEVERAL_ANSWERS,
    duplicates.LEAK,
    leaks.LEAK_PROMPT,
    leaks.LEAK_OVERLAP,
    private.PRIVATE,
    private.SECRET,
    balance.IMBALANCE,
    balance.RARE_CLASS,
    balance.LABEL_SPELLING,
    balance.SAME_ANSWER,
    balance.TEMPLATE,
    balance.LOW_VARIETY,
    clusters.FEW_CLUSTERS,
    stereotypes.STEREOTYPE,
    lengths.TOO_FEW,
    lengths.FEW,
    lengths.LENGTH_OUTLIER,
    lengths.OVER_LONG,
    lengths.NOTHING_TRAINED,
    judged.TOXIC,
    judged.DOUBTFUL,
)
RULES: dict[str, Rule] = {rule.id: rule for rule in (*READING, *LOOKING)}
