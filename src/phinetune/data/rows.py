"""From one parsed JSON value to one example, naming every fault of its shape.

The only place that knows what a row may look like. Knows nothing of lines, files or tokens.
"""

from __future__ import annotations

import json
import re
from typing import Any, get_args

from phinetune.base.errors import nearest
from phinetune.data.conversation import Conversation, Example, Message, PlainText, Role, Source
from phinetune.data.findings import Finding, Severity, excerpt

ROLES: tuple[str, ...] = get_args(Role)
_MESSAGE_KEYS = ("role", "content", "weight")
_TOOL_KEYS = ("tools", "functions", "tool_calls", "function_call", "tool_call_id")
_OTHER_ROLE_NAMES = {
    "human": "user",
    "model": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "developer": "system",
}
# Rows of other programs: a key that gives them away, and what to write instead.
_OTHER_FORMS = {
    "conversations": 'this is the ShareGPT form; write "messages" with "role" and "content"',
    "prompt": 'write the prompt as a user message and the answer as an assistant message of "messages"',
    "completion": 'write it as an assistant message of "messages"',
    "instruction": 'this is the Alpaca form; write instruction and input as a user message of "messages"',
    "preferred_output": "preference pairs (DPO) are not supported; keep the preferred answer",
    "chosen": "preference pairs (DPO) are not supported; keep the chosen answer",
    "chosen_messages": "preference pairs (DPO) are not supported; keep the chosen messages",
    "question": 'write the question as a user message and the answer as an assistant message of "messages"',
    "role": 'this is one bare message; put it into {"messages": [ … ]} with its answer',
}
_LOOKS_LIKE_CONTROL = re.compile(r"<\|[\w/]{1,40}\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>")


class RowExaminer:
    """Examines the rows of one file; a warning about an unknown key is given once for the file."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._told: set[tuple[str, str]] = set()
        self._line = 0
        self._findings: list[Finding] = []

    def examine(self, value: object, line: int) -> tuple[Example | None, list[Finding]]:
        """The example, or None when a finding is an error; and all findings of this row."""
        self._line, self._findings = line, []
        example = self._row(value)
        if any(finding.is_error for finding in self._findings):
            return None, self._findings
        return example, self._findings

    def examine_text(self, text: str, line: int, field: str = "") -> tuple[Example | None, list[Finding]]:
        """The same for a document that comes from no JSON."""
        self._line, self._findings = line, []
        self._text(text, field)
        if any(finding.is_error for finding in self._findings):
            return None, self._findings
        return PlainText(text=text, source=self._source()), self._findings

    def _row(self, value: object) -> Example | None:
        if not isinstance(value, dict):
            fix = 'write {"messages": [ … ]}'
            self._error("not_an_object", "", f"a row must be an object, this is {_kind(value)}", fix, value)
            return None
        if "messages" in value and "text" in value:
            self._error("two_forms", "", 'a row has "messages" or "text", not both', "delete one of them")
            return None
        if "messages" in value:
            self._unknown_keys(value, ("messages", "label"), "")
            return self._conversation(value["messages"], self._label(value))
        if "text" in value:
            self._unknown_keys(value, ("text", "label"), "")
            return self._plain_text(value["text"], self._label(value))
        self._no_messages(value)
        return None

    def _no_messages(self, value: dict[str, Any]) -> None:
        fix = next((fix for key, fix in _OTHER_FORMS.items() if key in value), "")
        near = next((key for key in value if nearest(key.lower(), ("messages", "text"))), "")
        if not fix and near:
            fix = f'did you mean "{nearest(near.lower(), ("messages", "text"))}" for "{excerpt(near)}"?'
        fix = (
            fix or 'write {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}'
        )
        self._error("no_messages", "", 'the row has neither "messages" nor "text"', fix, ", ".join(value))

    def _label(self, value: dict[str, Any]) -> str | None:
        """The class of a row; whole numbers are names too."""
        label = value.get("label")
        if label is None or (isinstance(label, int) and not isinstance(label, bool)):
            return None if label is None else str(label)
        if not isinstance(label, str) or not label.strip():
            message = "is empty" if isinstance(label, str) else f"must be text, this is {_kind(label)}"
            self._error("label_type", "label", message, "write the name of the row's class", label)
            return None
        return label

    def _plain_text(self, text: object, label: str | None) -> Example | None:
        if not isinstance(text, str):
            self._error(
                "text_type", "text", f"must be text, this is {_kind(text)}", "write it in quotes", text
            )
            return None
        if not text.strip():
            self._error("empty_text", "text", "is empty", "delete the row or write the text")
            return None
        self._text(text, "text")
        return PlainText(text=text, source=self._source(), label=label)

    def _conversation(self, messages: object, label: str | None) -> Example | None:
        if not isinstance(messages, list):
            fix = 'write [{"role": …, "content": …}, …]'
            self._error(
                "messages_type", "messages", f"must be a list, this is {_kind(messages)}", fix, messages
            )
            return None
        if not messages:
            self._error("no_turns", "messages", "is empty", "delete the row or write its turns")
            return None
        read = [self._message(entry, f"messages[{index}]") for index, entry in enumerate(messages)]
        sound = tuple(message for message in read if message is not None)
        if len(sound) < len(read):
            return None
        self._order(sound, has_label=label is not None)
        return Conversation(messages=sound, source=self._source(), label=label)

    def _message(self, entry: object, field: str) -> Message | None:
        if not isinstance(entry, dict):
            fix = 'write {"role": …, "content": …}'
            self._error("message_type", field, f"must be an object, this is {_kind(entry)}", fix, entry)
            return None
        self._unknown_keys(entry, _MESSAGE_KEYS, field)
        role = self._role(entry, field)
        content = self._content(entry, role, field)
        weight = self._weight(entry, role, field)
        if role is None or content is None or weight is None:
            return None
        return Message(role=role, content=content, weight=weight)

    def _role(self, entry: dict[str, Any], field: str) -> Role | None:
        role = entry.get("role")
        for known in get_args(Role):
            if role == known:
                return known  # type: ignore[no-any-return]
        field = f"{field}.role"
        if "role" not in entry:
            self._error("no_role", field, "is missing", "write system, user or assistant")
        elif isinstance(role, str) and role.strip().lower() in ("tool", "function"):
            self._error(
                "role", field, "tool turns are not supported", "leave conversations with tools out", role
            )
        elif isinstance(role, str):
            name = role.strip().lower()
            near = _OTHER_ROLE_NAMES.get(name) or nearest(name, ROLES)
            fix = f'write "{near}"' if near else "write system, user or assistant"
            self._error("role", field, "unknown role", fix, role)
        else:
            self._error(
                "role", field, f"must be text, this is {_kind(role)}", "write user or assistant", role
            )
        return None

    def _content(self, entry: dict[str, Any], role: Role | None, field: str) -> str | None:
        field = f"{field}.content"
        content = entry.get("content")
        if "content" not in entry:
            self._error("no_content", field, "is missing", "write the text of the turn")
        elif isinstance(content, list):
            fix = "write the text parts as one text; images and audio are not supported"
            self._error("content_type", field, "is a list of parts, not text", fix, content)
        elif not isinstance(content, str):
            self._error(
                "content_type", field, f"must be text, this is {_kind(content)}", "write text", content
            )
        elif not content.strip() and role == "system":
            self._warning("empty_system", field, "the system message is empty", "write it or leave it out")
            return content
        elif not content.strip():
            self._error("empty_content", field, "is empty", "write the text or delete the row")
        else:
            self._text(content, field)
            return content
        return None

    def _weight(self, entry: dict[str, Any], role: Role | None, field: str) -> int | None:
        if "weight" not in entry:
            return 1
        field, weight = f"{field}.weight", entry["weight"]
        if role not in (None, "assistant"):
            fix = "delete it; only assistant turns are trained"
            self._error("weight", field, f"a {role} turn has no weight", fix, weight)
        elif isinstance(weight, bool) or not isinstance(weight, int) or weight not in (0, 1):
            self._error("weight", field, "must be 0 or 1", "0: read but not trained, 1: trained", weight)
        else:
            return weight
        return None

    def _order(self, messages: tuple[Message, ...], *, has_label: bool) -> None:
        roles = [message.role for message in messages]
        answers = [message for message in messages if message.role == "assistant"]
        late = next((index for index, role in enumerate(roles) if role == "system" and index), None)
        if late is not None:
            fix = "put one system message in front of the others"
            self._error(
                "system_order", f"messages[{late}]", "a system message must come first, and once", fix
            )
        if has_label and roles[-1] != "assistant":
            return  # what is learnt is the label
        if not answers:
            fix = "add the answer that the model should give"
            self._error("no_assistant", "messages", "no assistant turn, so nothing to train", fix)
            return
        if not any(message.weight for message in answers):
            fix = "give one assistant turn weight 1 or delete the row"
            self._error(
                "all_weights_0", "messages", "every assistant turn has weight 0, nothing is trained", fix
            )
        if "user" not in roles:
            self._warning("no_user", "messages", "no user turn", "check that the question is not missing")
        if roles[-1] != "assistant":
            field = f"messages[{len(roles) - 1}]"
            self._warning(
                "no_answer", field, "the last turn has no answer", "it is not trained; add its answer"
            )
        for index in range(1, len(roles)):
            if roles[index] == roles[index - 1] != "system":
                message = f"two {roles[index]} turns in a row"
                self._warning("same_role", f"messages[{index}]", message, "join them if they belong together")
                break

    def _text(self, text: str, field: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            char = f"\\u{ord(text[error.start]):04x}"
            message = f"half of a character ({char}) at position {error.start + 1}"
            fix = "the text was cut inside a character; write it anew"
            self._error("surrogate", field, message, fix, text, error.start)
            return
        control = _LOOKS_LIKE_CONTROL.search(text)
        if control:
            message = f"{control.group()} in text is trained as plain letters, never as a control token"
            fix = 'write turns as "messages"; ignore this if the letters are meant'
            self._warning("control_text", field, message, fix, text, control.start())
        if "\ufffd" in text:
            message = "holds U+FFFD, the mark of a character lost in an earlier conversion"
            self._warning("lost_character", field, message, "take the text from its source again", text)

    def _unknown_keys(self, entry: dict[str, Any], known: tuple[str, ...], field: str) -> None:
        for key in entry:
            if key in known:
                continue
            path = f"{field}.{excerpt(key)}".lstrip(".")
            if key in _TOOL_KEYS:
                if entry[key]:
                    fix = "leave conversations with tools out, or delete the key"
                    self._error("tools", path, "tools are not supported", fix)
            elif (near := nearest(key.lower(), known)) and near not in entry:
                self._error("unknown_key", path, "unknown key", f'did you mean "{near}"?')
            elif ("message" if field else "row", key) not in self._told:
                self._told.add(("message" if field else "row", key))
                self._warning("unknown_key", path, "unknown key, not used (said once)", "delete it")

    def _source(self) -> Source:
        return Source(file=self._file, line=self._line)

    def _error(
        self, rule: str, field: str, message: str, fix: str, value: object = None, around: int = 0
    ) -> None:
        self._add("error", rule, field, message, fix, value, around)

    def _warning(
        self, rule: str, field: str, message: str, fix: str, value: object = None, around: int = 0
    ) -> None:
        self._add("warning", rule, field, message, fix, value, around)

    def _add(
        self, severity: Severity, rule: str, field: str, message: str, fix: str, value: object, around: int
    ) -> None:
        self._findings.append(
            Finding(
                rule=rule,
                severity=severity,
                file=self._file,
                line=self._line,
                field=field,
                excerpt=_shown(value, around),
                message=message,
                fix=fix,
            )
        )


def _shown(value: object, around: int) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return excerpt(value, around)
    try:
        return excerpt(json.dumps(value, ensure_ascii=False))
    except (RecursionError, ValueError):
        return ""


def _kind(value: object) -> str:
    kinds = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return "null" if value is None else kinds.get(type(value), "an object")
