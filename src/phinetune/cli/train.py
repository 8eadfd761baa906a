"""`phinetune train`: run a project's training and show it, from the plan to the comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phinetune.base.errors import SettingsError
from phinetune.cli import console

if TYPE_CHECKING:
    from phinetune.cli.run_view import RunView

# A plan longer than this, or one with warnings, is worth a question.
ASK_FROM_SECONDS = 600.0


def train(
    project: Annotated[Path, typer.Argument(help="Project folder.", show_default=False)],
    run: Annotated[
        str,
        typer.Option(help="Name of the run. Left out: a time stamp; with --resume the newest."),
    ] = "",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run after its last checkpoint.")
    ] = False,
    from_adapter: Annotated[
        Path | None,
        typer.Option(help="Begin with the weights of this adapter: a run, or a PEFT directory."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting for this run; may be repeated."),
    ] = None,
    nproc: Annotated[
        int, typer.Option(min=1, help="Processes of this machine that share the work; one per GPU.")
    ] = 1,
    shard: Annotated[
        bool,
        typer.Option("--shard", help="Divide the base among them, when it is too large for one."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print summary.json, nothing else.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Start without asking.")] = False,
) -> None:
    """Train an adapter, then compare it with the base model on the test set."""
    confirm = is_wanted if not (yes or json) else None
    overrides = parse_overrides(set_ or [])
    show_run(
        project,
        run_name=run or None,
        overrides=overrides,
        resume=resume,
        from_adapter=from_adapter,
        json=json,
        confirm=confirm,
        nproc=nproc,
        shard=shard,
    )


def parse_overrides(settings: list[str]) -> dict[str, str]:
    """`key=value` texts as a mapping.

    >>> parse_overrides(["epochs=2", "system_prompt=a=b"])
    {'epochs': '2', 'system_prompt': 'a=b'}
    """
    overrides: dict[str, str] = {}
    for setting in settings:
        key, sign, value = setting.partition("=")
        if not sign or not key.strip():
            raise SettingsError(
                f"'{setting}' is not a setting",
                where=f"--set {setting}",
                why="a setting has the form key=value",
                do="for example: --set learning_rate=1e-3",
            )
        if key.strip() in overrides:
            raise SettingsError(
                f"'{key.strip()}' is set twice", where=f"--set {setting}", do="keep one of the two"
            )
        overrides[key.strip()] = value.strip()
    return overrides


def show_run(
    project: Path,
    *,
    run_name: str | None,
    overrides: Mapping[str, str],
    json: bool,
    resume: bool = False,
    from_adapter: Path | None = None,
    confirm: Callable[[dict[str, Any]], bool] | None = None,
    nproc: int = 1,
    shard: bool = False,
) -> dict[str, Any]:
    """Run and show; ends the command when the user declines or interrupts. Returns the summary.

    In a process that is not the run's first there is nothing to show: the summary is empty.
    """
    from phinetune.cli.run_view import Declined, RunView
    from phinetune.cli.signals import asking
    from phinetune.runs.stopping import StopRequest
    from phinetune.runs.train_run import train_run

    stop = StopRequest()
    view = RunView(
        console.err(), None if json else console.out(), **({"confirm": confirm} if confirm else {})
    )
    run = train_run(
        project,
        run_name=run_name,
        overrides=overrides,
        resume=resume,
        from_adapter=from_adapter,
        stop=stop,
        on_progress=view.comparing,
        nproc=nproc,
        shard=shard,
    )
    with asking(stop) as signals:
        try:
            summary = view.follow(run)
        except Declined:
            console.note("not started")
            console.stop(console.DONE)
        except KeyboardInterrupt:
            raise console.Interrupted(kept(view, project), signals.exit_code) from None
    if view.is_stopped:
        raise console.Interrupted(kept(view, project), signals.exit_code)
    if json and summary:
        console.print_json(summary)
    elif summary:
        show_end(project, summary)
    return summary


def kept(view: RunView, project: Path) -> str:
    """What an interrupted run leaves behind, and how to go on."""
    if view.saved_path:
        return (
            f"interrupted at step {view.last_step}; the last checkpoint is kept: {view.saved_path}\n"
            f"to go on: phinetune train {project} --resume"
        )
    if view.last_step:
        return f"interrupted at step {view.last_step}, before the first checkpoint; no adapter was kept"
    return "interrupted before training began; no adapter was kept"


def show_end(project: Path, summary: Mapping[str, Any]) -> None:
    """The result in a line, where everything is, and what to try next."""
    from rich.text import Text

    from phinetune.cli.figures import headline

    folder = project / "runs" / summary["run_id"]
    if line := headline(summary["evaluation"]):
        console.say(Text(line, style="bold"), "")
    console.say(f"adapter  {summary['adapter']['path']}", f"report   {folder / 'report.html'}")
    asks = (
        (f'phinetune classify {folder} "..."',)
        if "accuracy" in summary["evaluation"]["difference"]
        else (f"phinetune chat {folder}", f'phinetune compare {folder} --prompt "..."')
    )
    console.next_commands(
        *asks,
        f"phinetune train {project} --set learning_rate=...",
    )


def is_wanted(plan: dict[str, Any]) -> bool:
    """Ask before a long run or one with warnings, when somebody is there to answer."""
    import sys

    warnings, seconds = plan.get("warnings"), (plan.get("forecast") or {}).get("total_seconds") or 0.0
    somebody = sys.stdin.isatty() and sys.stderr.isatty()
    if not somebody or (not warnings and seconds < ASK_FROM_SECONDS):
        return True
    return typer.confirm("start?", default=True, err=True)
