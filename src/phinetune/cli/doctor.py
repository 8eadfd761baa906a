"""`phinetune doctor`: what this machine has, what phinetune would use of it, and what is missing."""

from __future__ import annotations

from typing import Annotated

import typer

from phinetune.cli import console


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
) -> None:
    """Show hardware, precision, versions, disk and network, and what is missing."""
    from phinetune.cli.machine import inspect_machine

    console.note("looking at this machine ...", style="dim")
    machine = inspect_machine()
    if json:
        console.print_json(machine.record())
    else:
        _show(machine)
        console.next_commands("phinetune quickstart my-first-run")
    console.stop(console.DONE if machine.is_ready else console.FAILED)


def _show(machine: object) -> None:
    from rich.table import Table
    from rich.text import Text

    from phinetune.cli.machine import Machine

    assert isinstance(machine, Machine)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in machine.facts:
        grid.add_row(name, Text(text))
    console.say(grid, "")
    packages = Table.grid(padding=(0, 2))
    for column in ("package", "version", ""):
        packages.add_column(column, no_wrap=column != "", overflow="fold")
    for package in machine.packages:
        style = "" if package.version else "yellow" if package.extra else "red"
        version = Text(package.version or "missing", style=style)
        packages.add_row(package.name, version, Text(package.remark, style="dim"))
    console.say(packages)
    for missing in machine.missing:
        console.say("", Text(f"missing: {missing.what}", style="yellow"), f"  do: {missing.do}")
    if machine.is_ready:
        console.say("", Text("Ready: everything that training needs is here.", style="green"))
