"""`phinetune report`: write a run's report page anew and say where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phinetune.cli import console


def report(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print summary.json, nothing else.")] = False,
) -> None:
    """Write report.html anew, from the run's own files."""
    from phinetune.api import run_summary
    from phinetune.reports.page import report_html
    from phinetune.runs.folder import find_run

    found = find_run(run)
    summary = run_summary(found)
    report_html(found.path)
    if json:
        console.print_json(summary)
        return
    from rich.text import Text

    from phinetune.cli.comparison_view import comparison_table
    from phinetune.cli.figures import headline

    console.say(f"report   {found.report}", "", comparison_table(summary["evaluation"]))
    if line := headline(summary["evaluation"]):
        console.say(Text(line, style="bold"))
    is_classifier = "accuracy" in summary["evaluation"]["difference"]
    console.next_commands(f'phinetune classify {run} "..."' if is_classifier else f"phinetune chat {run}")
