"""The renderer: examples become token ids and the mask of trained tokens. The only place masks are made.

Knows nothing of models, batches or files of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from phinetune.base.errors import DataError, ModelError
from phinetune.data.conversation import Conversation, Example, Message, PlainText, Source
from phinetune.text.jinja import JinjaTemplate
from phinetune.text.layout import Ids, Mask, lay_out
from phinetune.text.model_files import chat_template_text, end_ids
from phinetune.text.pieces import Piece, Template, Text
from phinetune.text.template import choose_template
from phinetune.text.tokenizer import TextTokenizer, load_tokenizer

LossOn = Literal["assistant", "all"]
NUM_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rendered:
    """One example as the model sees it.

    `ids` int32 [T]; `trained` bool [T]: token t is a target that the model must predict from the tokens
    before it, so `trained[0]` is always False.
    """

    ids: Ids
    trained: Mask
    source: Source

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_trained(self) -> int:
        return int(self.trained.sum())


class Renderer:
    """Made by `load_renderer`. `template` is None for a model without a chat template."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        template: Template | None,
        *,
        stop_ids: frozenset[int],
        end_id: int | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.stop_ids = stop_ids
        self._end_id = end_id

    def example(
        self, example: Example, *, system_prompt: str | None = None, loss_on: LossOn = "assistant"
    ) -> Rendered:
        """One example; see `examples`."""
        return self.examples([example], system_prompt=system_prompt, loss_on=loss_on)[0]

    def examples(
        self, examples: Sequence[Example], *, system_prompt: str | None = None, loss_on: LossOn = "assistant"
    ) -> list[Rendered]:
        """All examples in order, much faster than one by one.

        `system_prompt` replaces the system message of the data, or stands in front where there is none.
        `loss_on="all"` trains every token but the first; plain text is always trained so, and ends with the
        end-of-text token. Raises DataError, with one finding per row, when a row cannot be written or has no
        token to train.
        """
        faults: list[DataError] = []
        chats: list[list[Piece]] = []
        for example in examples:
            try:
                chats.append(self._pieces(example, system_prompt))
            except DataError as error:
                faults.append(_at(example, error))
                chats.append([])
        if faults:
            raise joined(faults)
        laid_out = self._lay_out(examples, chats)
        rendered = []
        for example, (ids, trained) in zip(examples, laid_out, strict=True):
            if isinstance(example, PlainText):
                ids, trained = self._framed(ids)
            elif loss_on == "all":
                trained = _all_but_first(ids)
            if not trained.any():
                faults.append(_nothing_trained(example))
            elif isinstance(example, Conversation) and not self._has_trained_end(ids, trained):
                faults.append(_no_end(example))
            rendered.append(Rendered(ids=ids, trained=trained, source=example.source))
        if faults:
            raise joined(faults)
        return rendered

    def prompt(
        self, messages: Sequence[Message], *, system_prompt: str | None = None, generation_prompt: bool = True
    ) -> list[int]:
        """The ids of a request, up to and including the assistant's header if there is to be one.

        Raises DataError.
        """
        template = self._require_template()
        pieces = template.pieces(_with_system(messages, system_prompt), generation_prompt=generation_prompt)
        ids, _ = lay_out(self.tokenizer, [pieces])[0]
        return [int(id_) for id_ in ids]

    def split(self, example: Example) -> tuple[tuple[Message, ...], str]:
        """The messages before the last assistant turn, and the text of that turn. Raises DataError."""
        if isinstance(example, PlainText):
            raise DataError("plain text has no answer to compare with", where=str(example.source))
        roles = [message.role for message in example.messages]
        if "assistant" not in roles:
            raise DataError("no assistant turn", where=str(example.source), do="add the answer")
        last = len(roles) - 1 - roles[::-1].index("assistant")
        return example.messages[:last], example.messages[last].content

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without control tokens."""
        return self.tokenizer.decode(ids)

    def _pieces(self, example: Example, system_prompt: str | None) -> list[Piece]:
        if isinstance(example, PlainText):
            return [Text(example.text, True)]
        messages = _with_system(example.messages, system_prompt)
        return self._require_template().pieces(messages, generation_prompt=False)

    def _lay_out(
        self, examples: Sequence[Example], chats: Sequence[Sequence[Piece]]
    ) -> list[tuple[Ids, Mask]]:
        try:
            return lay_out(self.tokenizer, chats)
        except DataError:
            # Some text cannot be encoded: one by one tells which.
            faults = []
            for example, chat in zip(examples, chats, strict=True):
                try:
                    lay_out(self.tokenizer, [chat])
                except DataError as error:
                    faults.append(_at(example, error))
            raise joined(faults) from None

    def _has_trained_end(self, ids: Ids, trained: Mask) -> bool:
        return any(self.tokenizer.is_control(id_) for id_ in reversed(ids[trained].tolist()))

    def _framed(self, ids: Ids) -> tuple[Ids, Mask]:
        """A document between what the tokenizer puts around it; it ends with the end-of-text token."""
        before, after = self.tokenizer.text_frame()
        if not after and self._end_id is not None:
            after = [self._end_id]
        framed = np.concatenate([np.array(before, np.int32), ids, np.array(after, np.int32)])
        return framed, _all_but_first(framed)

    def _require_template(self) -> Template:
        if self.template is None:
            raise ModelError(
                "the model has no chat template",
                why="it was not made for conversations, so there is no right way to write them for it",
                do='use an instruct model, or data of plain text: {"text": …}',
            )
        return self.template


def load_renderer(model_folder: Path) -> Renderer:
    """The renderer of a model folder: tokenizer.json and the JSON files beside it. Raises ModelError."""
    if not model_folder.is_dir():
        do = "name a folder with tokenizer.json and config.json"
        raise ModelError("no such model folder", where=str(model_folder), do=do)
    tokenizer = load_tokenizer(model_folder)
    source = chat_template_text(model_folder)
    jinja = JinjaTemplate(source, tokenizer) if source is not None else None
    template = choose_template(tokenizer.special.get("eos_token"), frozenset(tokenizer.controls), jinja)
    ends = end_ids(model_folder)
    end_id = tokenizer.control_ids.get(tokenizer.special.get("eos_token", ""))
    surfaces = template.stop_surfaces if template is not None else ()
    stop_ids = set(ends) | {tokenizer.control_ids[surface] for surface in surfaces}
    if end_id is not None:
        stop_ids.add(end_id)
    return Renderer(
        tokenizer,
        template,
        stop_ids=frozenset(stop_ids),
        end_id=min(ends) if end_id is None and ends else end_id,
    )


def _with_system(messages: Sequence[Message], system_prompt: str | None) -> Sequence[Message]:
    if system_prompt is None:
        return messages
    others = [message for message in messages if message.role != "system"]
    return [Message(role="system", content=system_prompt), *others]


def _all_but_first(ids: Ids) -> Mask:
    trained = np.ones(len(ids), dtype=np.bool_)
    trained[:1] = False
    return trained


def _at(example: Example, error: DataError) -> DataError:
    return DataError(error.what, where=error.where or str(example.source), why=error.why, do=error.do)


def _nothing_trained(example: Example) -> DataError:
    is_chat = isinstance(example, Conversation)
    return DataError(
        "no token of this row is trained",
        where=str(example.source),
        why="no assistant turn with weight 1 has text" if is_chat else "the text has no second token",
        do="add an assistant turn, or delete the row" if is_chat else "delete the row",
    )


def _no_end(example: Example) -> DataError:
    return DataError(
        "no token that ends an answer is trained",
        where=str(example.source),
        why="the model's chat template ends the assistant's turn with plain text: the model would never stop",
        do="use an instruct model whose template ends each turn with a control token",
    )


def joined(faults: Sequence[DataError], num_faults: int | None = None) -> DataError:
    """One error for the faults of many rows; `num_faults` when there were more than are given."""
    num_faults = num_faults or len(faults)
    if num_faults == 1:
        return faults[0]
    lines = [f"  {fault.where}: {fault.what}" for fault in faults[:NUM_SHOWN]]
    if num_faults > NUM_SHOWN:
        lines.append(f"  and {num_faults - NUM_SHOWN:,} more")
    do = next((fault.do for fault in faults if fault.do), "")
    what = "\n".join([f"{num_faults:,} rows cannot be trained on", *lines])
    return DataError(what, do=do, findings=tuple(faults))
