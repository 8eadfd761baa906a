"""Write docs/settings.md, docs/cli.md and docs/data-rules.md from the code, or say which of them is stale.

Usage: python tools/write_docs.py [--check]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from phinetune.cli.main import app
from phinetune.data.rules.catalog import LOOKING, READING
from phinetune.training.settings import GROUPS, TrainingSettings, group_of

DOCS = Path(__file__).parents[1] / "docs"
COMMAND: Any = typer.main.get_command(app)
GENERATED = "<!-- Written by tools/write_docs.py. Do not edit: run `make docs`. -->\n"


def pages() -> dict[str, str]:
    """The generated pages by file name."""
    return {"settings.md": settings_page(), "cli.md": cli_page(), "data-rules.md": rules_page()}


def settings_page() -> str:
    """Every key of lora.yaml with its type, default and meaning."""
    out = [
        GENERATED,
        "# Settings",
        "",
        "Every key of `lora/lora.yaml`. For one run only: `phinetune train PROJECT --set KEY=VALUE`.",
        "An unknown key is refused, with the nearest known name.",
    ]
    for group, title in GROUPS.items():
        out += ["", f"## {title}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for name, field in TrainingSettings.model_fields.items():
            if group_of(name) == group:
                kind = type_text(name).replace("|", "\\|")
                meaning = (field.description or "").replace("|", "\\|")
                out.append(f"| `{name}` | {kind} | `{json.dumps(field.default)}` | {meaning} |")
    return "\n".join(out) + "\n"


def rules_page() -> str:
    """Every rule for data: what it means, what to do, and what cleaning does."""
    out = [
        GENERATED,
        "# Rules for data",
        "",
        "What `phinetune data check` looks for. An error stops training, a warning is likely to harm it,",
        "a note is worth knowing. What these find and miss: [data.md](data.md).",
    ]
    for title, rules in (("Reading", READING), ("Rows and files", LOOKING)):
        out += [
            "",
            f"## {title}",
            "",
            "| rule | severity | meaning | fix | `data clean` |",
            "|---|---|---|---|---|",
        ]
        for rule in rules:
            cells = (f"`{rule.id}`", rule.severity, rule.meaning, rule.fix, rule.can_clean)
            out.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(out) + "\n"


def type_text(name: str) -> str:
    """The type of a setting with its limits, in words."""
    schema = TrainingSettings.model_json_schema()["properties"][name]
    kinds = schema.get("anyOf", [schema])
    texts = []
    for kind in kinds:
        if "enum" in kind:
            texts.append(" | ".join(f"`{value}`" for value in kind["enum"]))
            continue
        is_numbers = kind.get("items", {}).get("type") == "integer"
        words = {"array": f"list of {'numbers' if is_numbers else 'names'}", "object": "number by name"}
        text = words.get(kind["type"], kind["type"])
        limits = [
            f"{sign} {kind[key]:g}"
            for key, sign in (
                ("minimum", ">="),
                ("exclusiveMinimum", ">"),
                ("maximum", "<="),
                ("exclusiveMaximum", "<"),
            )
            if key in kind
        ]
        texts.append(", ".join([text, *limits]))
    return " or ".join(texts)


def cli_page() -> str:
    """Every command with its arguments and options, read from the live command line."""
    out = [
        GENERATED,
        "# Commands",
        "",
        "Results go to standard output, plans, progress and errors to standard error.",
        "Exit codes: 0 done, 1 failed, 2 the input is wrong, 130 interrupted, 143 ended by SIGTERM.",
    ]
    for path, command in commands(COMMAND, "phinetune"):
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
        usage = " ".join([path, *(argument_text(p) for p in arguments), "[OPTIONS]" if options else ""])
        out += ["", f"## {path}", "", " ".join((command.help or "").split()), "", f"    {usage.strip()}"]
        rows = [f"| `{argument_name(p).replace('|', chr(92) + '|')}` | {p.help or ''} |" for p in arguments]
        rows += [f"| `{option_text(p)}` | {p.help or ''}{default_text(p)} |" for p in options]
        if rows:
            out += ["", "| | |", "|---|---|", *rows]
    return "\n".join(out) + "\n"


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every command that does something, with its full name."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, child in command.commands.items():
        yield from commands(child, f"{path} {name}")


def argument_name(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def argument_text(parameter: Any) -> str:
    name = argument_name(parameter)
    return name if parameter.required else f"[{name}]"


def option_text(parameter: Any) -> str:
    names = ", ".join(parameter.opts)
    if parameter.is_flag:
        return names
    return f"{names} {parameter.metavar or option_type(parameter)}"


def option_type(parameter: Any) -> str:
    """What to write after the option: its type, without the brackets of the help page."""
    context = COMMAND.make_context("phinetune", [], resilient_parsing=True)
    return str(parameter.display_type(context)).strip("<>").upper()


def default_text(parameter: Any) -> str:
    if parameter.is_flag or parameter.default in (None, "") or not parameter.show_default:
        return " Required." if parameter.required else ""
    return f" Default: {parameter.default}."


def main() -> int:
    stale = []
    for name, text in pages().items():
        path = DOCS / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8", newline="\n")
            print(f"wrote {path.name}")
    if stale and "--check" in sys.argv:
        print(f"stale: {', '.join(stale)}; run: make docs")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
