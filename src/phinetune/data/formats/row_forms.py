"""The shapes that a row may have in the world, and each one written as our own: messages or text.

Values are not judged here, only put in their places; `rows` examines them afterwards. Knows nothing of files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from phinetune.base.errors import SettingsError, nearest

Slot = Literal["system", "prompt", "context", "answer", "text", "label"]
SLOTS: tuple[Slot, ...] = ("system", "prompt", "context", "answer", "text", "label")
PROMPTS = ("prompt", "instruction", "question", "query", "input")
ANSWERS = ("completion", "response", "answer", "output", "reply")
_CONTEXTS = ("input", "context")
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bing": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
PREFERRED = ("preferred_output", "chosen", "chosen_messages")
REJECTED = ("non_preferred_output", "rejected", "rejected_messages")
_TOOL_KEYS = ("tools", "functions")
_CALL_KEYS = ("tool_calls", "function_call")
_RESULT_ROLES = ("tool", "function", "observation", "function_response")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """What the user said about a file: its columns by slot, and what becomes of rows for other training.

    `keep_preferred` reads the preferred answer of a preference pair; `tools_as_text` writes tool calls and
    their results out as the text of their turns.
    """

    columns: tuple[tuple[Slot, str], ...] = ()
    keep_preferred: bool = False
    tools_as_text: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Standard:
    """A row as messages or text. `fields` are the user's names of the messages, "" where they are ours."""

    value: dict[str, Any]
    fields: tuple[str, ...] = ()
    used: frozenset[str] = frozenset()


def column_options(pairs: Iterable[str]) -> tuple[tuple[Slot, str], ...]:
    """`prompt=question` and the like as (slot, column). Raises SettingsError.

    >>> column_options(["prompt=question", "answer=reply"])
    (('prompt', 'question'), ('answer', 'reply'))
    """
    found: dict[Slot, str] = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        slot = next((slot for slot in SLOTS if slot == name.strip()), None)
        if slot is None or not equals or not column.strip():
            near = nearest(name.strip(), SLOTS)
            raise SettingsError(
                f"a column is named as slot=column, not {pair!r}",
                where="--map",
                why=f"the slots are {', '.join(SLOTS)}",
                do=f"did you mean {near}={column or '…'}?"
                if near
                else "for example: --map prompt=question --map answer=reply",
            )
        found[slot] = column.strip()
    if found and "text" not in found and not {"prompt", "answer"} <= found.keys():
        raise SettingsError(
            "a prompt and an answer are needed, or a text",
            where="--map",
            do="for example: --map prompt=question --map answer=reply, or --map text=body",
        )
    return tuple(found.items())


def form_name(value: object, options: ReadOptions) -> str:
    """What a row is, in words."""
    for name, reader in _FORMS:
        if reader(value, options) is not None:
            return name
    if isinstance(value, dict):
        if any(key in value for key in PREFERRED):
            return "preference pairs (DPO)"
        return f"rows with {', '.join(map(str, list(value)[:6]))}" if value else "empty rows"
    return "values that are no objects"


def standard_row(value: object, options: ReadOptions) -> Standard | None:
    """The row as messages or text, or None when no form fits it."""
    for _, reader in _FORMS:
        if (row := reader(value, options)) is not None:
            return row
    return None


def _mapped(value: object, options: ReadOptions) -> Standard | None:
    if not options.columns or not isinstance(value, dict):
        return None
    columns = dict(options.columns)
    if not any(column in value for column in columns.values()):
        return None
    used = frozenset(columns.values())
    label = {"label": value.get(columns["label"])} if "label" in columns else {}
    if "text" in columns:
        return Standard(value={"text": _as_text(value.get(columns["text"])), **label}, used=used)
    row = _turns(value, columns.get("system"), columns["prompt"], columns.get("context"), columns["answer"])
    return Standard(value={**row.value, **label}, fields=row.fields, used=row.used | used)


def _own(value: object, options: ReadOptions) -> Standard | None:
    if isinstance(value, dict) and "messages" in value:
        row = _without_tools(value) if options.tools_as_text else value
        return Standard(value=row, used=frozenset({"messages", "label"}))
    return None


def _own_list(value: object, options: ReadOptions) -> Standard | None:
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "role" in turn for turn in value):
        return Standard(value={"messages": value})
    return None


def _text(value: object, options: ReadOptions) -> Standard | None:
    return (
        Standard(value=value, used=frozenset({"text", "label"}))
        if isinstance(value, dict) and "text" in value
        else None
    )


def _sharegpt(value: object, options: ReadOptions) -> Standard | None:
    if not isinstance(value, dict) or not isinstance(turns := value.get("conversations"), list):
        return None
    messages: list[Any] = []
    fields: list[str] = []
    if isinstance(value.get("system"), str) and value["system"].strip():
        messages.append({"role": "system", "content": value["system"]})
        fields.append("system")
    for index, turn in enumerate(turns):
        fields.append(f"conversations[{index}]")
        if not isinstance(turn, dict) or "from" not in turn:
            messages.append(turn)
            continue
        role = turn["from"]
        role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
        rest = {key: entry for key, entry in turn.items() if key not in ("from", "value")}
        messages.append({"role": role, "content": turn.get("value"), **rest})
    row = {"messages": messages, **{key: value[key] for key in _TOOL_KEYS if key in value}}
    row = _without_tools(row) if options.tools_as_text else row
    return Standard(value=row, fields=tuple(fields), used=frozenset({"conversations", "system", *_TOOL_KEYS}))


def _alpaca(value: object, options: ReadOptions) -> Standard | None:
    if not isinstance(value, dict) or "instruction" not in value:
        return None
    answer = next((key for key in ANSWERS if key in value), None)
    if answer is None:
        return None
    context = next((key for key in _CONTEXTS if isinstance(value.get(key), str) and value[key].strip()), None)
    system = "system" if isinstance(value.get("system"), str) and value["system"].strip() else None
    row = _turns(value, system, "instruction", context, answer)
    return Standard(value=row.value, fields=row.fields, used=row.used | {*_CONTEXTS, "system"})


def _pair(value: object, options: ReadOptions) -> Standard | None:
    if not isinstance(value, dict):
        return None
    prompt = next((key for key in PROMPTS if key in value), None)
    answer = next((key for key in ANSWERS if key in value and key != prompt), None)
    if prompt is None or answer is None:
        return None
    asked, answered = value[prompt], value[answer]
    if isinstance(asked, list) and isinstance(answered, list):
        fields = [f"{prompt}[{index}]" for index in range(len(asked))]
        fields += [f"{answer}[{index}]" for index in range(len(answered))]
        return Standard(
            value={"messages": asked + answered}, fields=tuple(fields), used=frozenset({prompt, answer})
        )
    context = "context" if isinstance(value.get("context"), str) and value["context"].strip() else None
    system = "system" if isinstance(value.get("system"), str) and value["system"].strip() else None
    return _turns(value, system, prompt, context, answer)


def _preferred(value: object, options: ReadOptions) -> Standard | None:
    if not options.keep_preferred or not isinstance(value, dict):
        return None
    key = next((key for key in PREFERRED if key in value), None)
    if key is None:
        return None
    answer, asked = value[key], value.get("prompt", value.get("question"))
    if isinstance(given := value.get("input"), dict):
        asked = given.get("messages")
    before = (
        asked
        if isinstance(asked, list)
        else [{"role": "user", "content": asked}]
        if asked is not None
        else []
    )
    after = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    used = frozenset({*PREFERRED, *REJECTED, "input", "prompt", "question"})
    return Standard(value={"messages": [*before, *after]}, used=used)


_FORMS: tuple[tuple[str, Callable[[object, ReadOptions], Standard | None]], ...] = (
    ("the columns you named", _mapped),
    ("messages", _own),
    ("messages", _own_list),
    ("ShareGPT conversations", _sharegpt),
    ("preference pairs, preferred answers kept", _preferred),
    ("Alpaca instructions", _alpaca),
    ("prompts and answers", _pair),
    ("text", _text),
)


def _turns(
    value: dict[str, Any], system: str | None, prompt: str, context: str | None, answer: str
) -> Standard:
    asked = _as_text(value.get(prompt))
    if context is not None and isinstance(given := _as_text(value.get(context)), str) and given.strip():
        asked = f"{asked}\n\n{given}"
    turns = [("user", asked, prompt), ("assistant", _as_text(value.get(answer)), answer)]
    if system is not None and value.get(system):
        turns.insert(0, ("system", _as_text(value[system]), system))
    return Standard(
        value={"messages": [{"role": role, "content": content} for role, content, _ in turns]},
        fields=tuple(field for _, _, field in turns),
        used=frozenset(name for name in (system, prompt, context, answer) if name),
    )


def _as_text(value: object) -> object:
    """Numbers and truth values are answers too where the form has no types of its own."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int | float) else value


def _without_tools(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its tools in the system message, calls as JSON in the answer, results as a user's turn."""
    turns = row["messages"] if isinstance(row.get("messages"), list) else None
    if turns is None:
        return row
    messages = [_plain_turn(turn) if isinstance(turn, dict) else turn for turn in turns]
    tools = next((row[key] for key in _TOOL_KEYS if row.get(key)), None)
    if tools is not None:
        text = "Tools: " + (tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False))
        first = messages[0] if messages and isinstance(messages[0], dict) else {}
        if first.get("role") == "system" and isinstance(first.get("content"), str):
            messages[0] = {**first, "content": f"{first['content']}\n\n{text}"}
        else:
            messages.insert(0, {"role": "system", "content": text})
    rest = {
        key: value
        for key, value in row.items()
        if key not in (*_TOOL_KEYS, "messages", "parallel_tool_calls")
    }
    return {**rest, "messages": messages}


def _plain_turn(turn: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in turn.items() if key not in (*_CALL_KEYS, "tool_call_id")}
    calls = next((turn[key] for key in _CALL_KEYS if turn.get(key)), None)
    if calls is not None:
        listed = calls if isinstance(calls, list) else [calls]
        functions = [call.get("function", call) if isinstance(call, dict) else call for call in listed]
        text = json.dumps(functions if len(functions) > 1 else functions[0], ensure_ascii=False)
        said = turn.get("content")
        kept["content"] = f"{said}\n{text}" if isinstance(said, str) and said.strip() else text
    if turn.get("role") == "function_call":
        kept["role"] = "assistant"
    if turn.get("role") in _RESULT_ROLES:
        named = turn.get("name")
        kept = {
            "role": "user",
            "content": f"Result of {named}: {kept.get('content')}" if named else kept.get("content"),
        }
    return kept
