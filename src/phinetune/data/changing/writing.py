"""Examples as rows of files, in our own form and those of others; and the recipe that stands beside them.

A file appears whole or not at all, and never over another one. Knows nothing of rules.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from phinetune.base.errors import DataError, SettingsError, UserError, nearest
from phinetune.base.files import committed_file, sha256_file, write_atomically
from phinetune.data.conversation import Conversation, Example, Message, PlainText, Source

RECIPE_SUFFIX = ".recipe.json"
_BATCH_ROWS = 1024
FORMS = ("messages", "sharegpt", "alpaca", "pairs")


def row_of(example: Example) -> dict[str, Any]:
    """An example in our own form.

    >>> row_of(PlainText(text="a", source=Source(file="x", line=1)))
    {'text': 'a'}
    """
    label = {"label": example.label} if example.label is not None else {}
    if isinstance(example, PlainText):
        return {"text": example.text, **label}
    return {"messages": [_message(message) for message in example.messages], **label}


def _message(message: Message) -> dict[str, Any]:
    weight = {} if message.weight == 1 else {"weight": message.weight}
    return {"role": message.role, "content": message.content, **weight}


def example_of(row: dict[str, Any], source: Source) -> Example:
    """The example of a row that `row_of` made."""
    label = row.get("label")
    if "text" in row:
        return PlainText(text=row["text"], source=source, label=label)
    messages = tuple(Message(**message) for message in row["messages"])
    return Conversation(messages=messages, source=source, label=label)


def line_of(row: Any) -> str:
    """A row on one line, with its line end."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def refuse_existing(path: Path) -> None:
    """Raises `UserError` where something stands already."""
    if path.exists():
        raise UserError(
            f"'{path}' is there already",
            where=str(path),
            why="data is never written over",
            do="choose another name with --to, or delete it",
        )


def write_file(path: Path, examples: Iterable[Example], form: str = "messages") -> int:
    """Write examples to a file of the kind its name says; returns how many. See `writer_of` for the kinds."""
    refuse_existing(path)
    writer = writer_of(path, form)
    with committed_file(path) as temporary:
        return writer(temporary, examples)


Writer = Callable[[Path, Iterable[Example]], int]


def writer_of(path: Path, form: str) -> Writer:
    """What writes the kind of file that a name says: .jsonl, .json, .csv, .tsv, .parquet, .txt, .md.

    Raises `SettingsError` for a name or form that cannot be written.
    """
    if form not in FORMS:
        near = nearest(form, FORMS)
        raise SettingsError(
            f"rows cannot be written as '{form}'", where="--form", do=f"write {near or ', '.join(FORMS)}"
        )
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return lambda to, examples: _write_lines(to, (_in_form(example, form) for example in examples))
    if suffix == ".json":
        return lambda to, examples: _write_array(to, (_in_form(example, form) for example in examples))
    if suffix in (".csv", ".tsv"):
        return lambda to, examples: _write_table(to, examples, "\t" if suffix == ".tsv" else ",")
    if suffix == ".parquet":
        return lambda to, examples: _write_parquet(to, (_in_form(example, form) for example in examples))
    if suffix in (".txt", ".md"):
        return _write_text
    raise SettingsError(
        f"'{path.name}' says no kind of file that can be written",
        where="--to",
        do="end it in .jsonl, .json, .csv, .tsv, .parquet, .txt or .md",
    )


def _write_lines(path: Path, rows: Iterable[Any]) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(line_of(row))
            count += 1
    return count


def _write_array(path: Path, rows: Iterable[Any]) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(("[\n" if not count else ",\n") + json.dumps(row, ensure_ascii=False))
            count += 1
        file.write("[]\n" if not count else "\n]\n")
    return count


def _write_table(path: Path, examples: Iterable[Example], delimiter: str) -> int:
    with path.open("w", encoding="utf-8", newline="") as file:
        return _table_rows(file, examples, delimiter)


def _table_rows(file: TextIO, examples: Iterable[Example], delimiter: str) -> int:
    writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
    count, columns = 0, None
    for example in examples:
        row = row_of(example) if isinstance(example, PlainText) else _pair(example, "a table")
        if columns is None:
            columns = list(row) if "text" in row else ["system", "prompt", "answer"]
            writer.writerow(columns)
        if not row.keys() <= set(columns):
            why = "it has a label, and the first row has none" if "label" in row else "some rows are chats"
            raise _unfit(example, "a table", why)
        writer.writerow([row.get(column, "") for column in columns])
        count += 1
    return count


def _write_parquet(path: Path, rows: Iterable[Any]) -> int:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise SettingsError(
            "writing .parquet needs pyarrow",
            where="--to",
            do="pip install 'phinetune[data]', or write .jsonl",
        ) from None
    count, writer = 0, None
    kept: set[str] = set()
    try:
        for batch in _batched(rows, _BATCH_ROWS):
            if writer and (lost := _field_names(pyarrow.Table.from_pylist(batch).schema) - kept):
                raise DataError(
                    f"a later row has {', '.join(sorted(lost))}, which the first {_BATCH_ROWS:,} have not",
                    where=str(path),
                    why="a Parquet file has the same columns from its first row on",
                    do="write .jsonl",
                )
            table = pyarrow.Table.from_pylist(batch, schema=writer.schema if writer else None)
            kept = kept or _field_names(table.schema)
            writer = writer or parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
            count += len(batch)
    finally:
        if writer:
            writer.close()
    if writer is None:
        parquet.write_table(pyarrow.table({"messages": []}), path)
    return count


def _batched(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _field_names(schema: Any) -> set[str]:
    """The columns, and the keys of a turn."""
    names = set(schema.names)
    for field in schema:
        turn = getattr(field.type, "value_type", None)
        names |= {turn.field(index).name for index in range(turn.num_fields)} if turn is not None else set()
    return names


def _write_text(path: Path, examples: Iterable[Example]) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for example in examples:
            if not isinstance(example, PlainText) or example.label is not None:
                why = "the row has a label" if isinstance(example, PlainText) else "the row is a chat"
                raise _unfit(example, "plain text", why)
            file.write(("\n" if count else "") + example.text.strip("\n") + "\n")
            count += 1
    return count


def _in_form(example: Example, form: str) -> dict[str, Any]:
    if form == "messages" or isinstance(example, PlainText):
        return row_of(example)
    if form == "sharegpt":
        names = {"system": "system", "user": "human", "assistant": "gpt"}
        _refuse_weights(example, "ShareGPT")
        turns = [{"from": names[message.role], "value": message.content} for message in example.messages]
        return {"conversations": turns}
    pair = _pair(example, form)
    if form == "pairs":
        system = {"system": pair["system"]} if "system" in pair else {}
        return {**system, "prompt": pair["prompt"], "completion": pair["answer"]}
    system = {"system": pair["system"]} if "system" in pair else {}
    return {**system, "instruction": pair["prompt"], "input": "", "output": pair["answer"]}


def _pair(example: Conversation, form: str) -> dict[str, str]:
    """System, prompt and answer of a conversation of one turn."""
    if example.label is not None:
        raise _unfit(example, form, "the row has a label")
    roles = [message.role for message in example.messages]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise _unfit(example, form, f"the row has the turns {', '.join(roles)}")
    _refuse_weights(example, form)
    names = {"system": "system", "user": "prompt", "assistant": "answer"}
    return {names[message.role]: message.content for message in example.messages}


def _refuse_weights(example: Conversation, form: str) -> None:
    if any(message.weight != 1 for message in example.messages):
        raise _unfit(example, form, "the row has turns of weight 0")
    if example.label is not None:
        raise _unfit(example, form, "the row has a label")


def _unfit(example: Example, form: str, why: str) -> DataError:
    return DataError(
        f"a row does not fit into {form}",
        where=str(example.source),
        why=why,
        do="write it as messages: --form messages",
    )


def source_record(path: Path) -> dict[str, Any]:
    """A file as a recipe names it: without the folders, which are nobody's business."""
    if path.is_dir():
        return {"name": path.name}
    return {"name": path.name, "size_bytes": path.stat().st_size, "sha256": sha256_file(path)}


def write_recipe(beside: Path, recipe: dict[str, Any]) -> Path:
    """Write how a file was made, as `NAME.recipe.json` beside it."""
    path = beside.with_name(beside.name + RECIPE_SUFFIX)
    record = {**recipe, "output": source_record(beside)}
    write_atomically(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return path
