"""Run a model's Jinja chat template without trusting it: no access to Python, bounded output.

Offers what transformers offers to chat templates: `raise_exception`, `strftime_now`, `tojson`, loop
controls and `{% generation %}`. Knows nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phinetune.base.errors import DataError, ModelError

MAX_GROWTH_CHARS = 1_000_000
Dialogue = Sequence[tuple[str, str]]

_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class _GenerationTag(Extension):
    """`{% generation %}` marks what the assistant writes; here only its content counts."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Repeats no text beyond the limit, and knows no powers: both can fill the memory in one step."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("powers are not allowed in a chat template")
        sizes = [len(value) if hasattr(value, "__len__") else value for value in (left, right)]
        if (
            any(hasattr(value, "__len__") for value in (left, right))
            and sizes[0] * sizes[1] > MAX_GROWTH_CHARS
        ):
            raise SecurityError("a chat template may not repeat text without end")
        return super().call_binop(context, operator, left, right)


def compile_template(
    source: str,
    special: Mapping[str, str],
    variables: Mapping[str, Any] | None = None,
    *,
    has_typed_content: bool = False,
) -> Callable[[Dialogue, bool], str]:
    """A function from (role, content) pairs and "with a generation prompt?" to the chat's text.

    `variables` are further ones that the template reads. With `has_typed_content` it gets each content as
    a list with one part of type text, as templates of models that also see pictures want it.
    Raises ModelError for a template that cannot be read; the function raises DataError for a chat that the
    template refuses or fails on.
    """
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, LoopControlExtension]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    # One moment for all chats of a template: a date in the header may not change within a run.
    environment.globals["strftime_now"] = datetime.now().strftime
    try:
        template = environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        where = f"line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        do = "take the model's files anew, or correct its chat template"
        raise ModelError(
            "the model's chat template is no Jinja", where=where, why=str(error), do=do
        ) from error

    def render(dialogue: Dialogue, generation_prompt: bool) -> str:
        messages = [
            {"role": role, "content": [{"type": "text", "text": content}] if has_typed_content else content}
            for role, content in dialogue
        ]
        limit = MAX_GROWTH_CHARS + 8 * sum(len(content) for _, content in dialogue)
        parts: list[str] = []
        size = 0
        try:
            for part in template.generate(
                **special,
                **(variables or {}),
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=generation_prompt,
            ):
                parts.append(part)
                size += len(part)
                if size > limit:
                    raise DataError("the model's chat template writes without end", do="use another model")
        except _TEMPLATE_FAULTS as error:
            raise DataError(
                "the model's chat template refuses this conversation",
                why=str(error) or type(error).__name__,
                do="write the turns as this model wants them: often user and assistant in turn, no system",
            ) from error
        return "".join(parts)

    return render


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
