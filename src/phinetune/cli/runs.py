"""`phinetune runs`: list, show, compare, watch and delete the runs of a project."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phinetune.base.errors import UserError
from phinetune.cli import console

if TYPE_CHECKING:
    from phinetune.runs.folder import RunFolder

runs_app = typer.Typer(
    help="List, show, compare, watch and delete runs.", no_args_is_help=True, pretty_exceptions_enable=False
)
RUN = typer.Argument(help="Run folder, or a project: then its newest run.", show_default=False)


@runs_app.command("list")
def list_runs(
    project: Annotated[Path, typer.Argument(help="Project folder.")] = Path("."),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """One line per run, the newest first."""
    import dataclasses

    from phinetune.runs.folder import runs_newest_first
    from phinetune.runs.overview import overview
    from phinetune.runs.project import is_project

    found = [overview(run) for run in runs_newest_first(project)]
    if not found and not is_project(project):
        raise UserError(
            f"'{project}' is not a project", where=str(project), do="name a folder made by 'phinetune new'"
        )
    if json:
        console.print_json({"runs": [dataclasses.asdict(item) for item in found]})
        return
    if not found:
        console.say("no run yet")
        console.next_commands(f"phinetune train {project}")
        return
    from phinetune.cli.runs_view import runs_table
    from phinetune.runs.rendering import CACHE, cache_bytes

    console.say(runs_table(found))
    if size_bytes := cache_bytes(project):
        console.say(f"tokenised data: {size_bytes / 1e6:,.0f} MB in {project / CACHE} (may be deleted)")
    console.next_commands(f"phinetune runs show {_relative(found[0].path)}")


@runs_app.command()
def show(
    run: Annotated[Path, RUN],
    json: Annotated[bool, typer.Option("--json", help="Print run.json and summary.json as one.")] = False,
) -> None:
    """State, settings that are not the default, and result of a run."""
    from phinetune.cli.comparison_view import comparison_table
    from phinetune.cli.runs_view import run_grid
    from phinetune.runs.folder import find_run
    from phinetune.runs.overview import overview
    from phinetune.training.settings import TrainingSettings

    found = find_run(run)
    record, summary = found.record(), _summary(found)
    if json:
        console.print_json({"record": {**record, "status": found.status()}, "summary": summary})
        return
    defaults = TrainingSettings().model_dump(mode="json")
    settings = {key: value for key, value in record["settings"].items() if value != defaults.get(key)}
    console.say(run_grid(overview(found), settings, found.lineage()))
    if summary:
        console.say("", comparison_table(summary["evaluation"]))
    status = found.status()
    project = _relative(found.path.parent.parent)
    console.next_commands(
        *([f"phinetune runs watch {run}"] if status == "running" else []),
        *([f"phinetune train {project} --resume --run {found.run_id}"] if status == "interrupted" else []),
        *([f"phinetune train {project} --from-adapter {run}"] if status == "succeeded" else []),
        f"phinetune runs compare {run} OTHER",
    )


@runs_app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Settings that differ, and the figures, side by side."""
    import dataclasses

    from phinetune.cli.runs_view import side_by_side_table
    from phinetune.runs.overview import side_by_side

    found = side_by_side([_the_run(run) for run in runs])
    if json:
        console.print_json(dataclasses.asdict(found))
        return
    for warning in found.warnings:
        console.note(f"warning  {warning}", style="yellow")
    console.say(side_by_side_table(found))


@runs_app.command()
def watch(run: Annotated[Path, RUN]) -> None:
    """Show a run that another process trains, from its plan to its end. Ctrl-C ends the watching only."""
    from phinetune.cli.run_view import RunView
    from phinetune.runs import watching
    from phinetune.runs.folder import find_run

    found = find_run(run)
    try:
        RunView(console.err(), console.out()).follow(watching.watch(found))
    except KeyboardInterrupt:
        raise console.Interrupted(f"no longer watching; run '{found.run_id}' goes on") from None
    console.say(f"run '{found.run_id}': {found.status()}")


@runs_app.command()
def delete(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders.", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
) -> None:
    """Delete runs with their checkpoints, adapters and reports. A running one is refused."""
    from phinetune.base.files import discard
    from phinetune.cli.figures import size_text

    found = list({run.path: run for run in map(_the_run, runs)}.values())
    for run in found:
        if run.status() == "running":
            raise UserError(
                f"run '{run.run_id}' is running",
                where=str(run.path),
                why="another process writes it; nothing was deleted",
                do="end it first",
            )
    for run in found:
        size_bytes = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
        console.note(f"delete   {run.path}  ({size_text(size_bytes)}, {run.status()})")
    if not yes:
        _ask()
    for run in found:
        discard(run.path)
        console.say(f"deleted  {run.path}")


def _ask() -> None:
    if not sys.stdin.isatty():
        raise UserError("nothing was deleted: nobody is there to be asked", do="write --yes")
    if not typer.confirm("delete for good?", default=False, err=True):
        console.note("nothing was deleted")
        console.stop(console.DONE)


def _the_run(path: Path) -> RunFolder:
    """Exactly the run that is named: a project does not stand for one here."""
    from phinetune.runs.folder import RunFolder

    if not (path / "run.json").is_file():
        raise UserError(
            f"'{path}' is not a run",
            where=str(path),
            why="run.json is not in it",
            do="name a folder in runs/; 'phinetune runs list PROJECT' shows them",
        )
    return RunFolder(path.resolve())


def _summary(run: RunFolder) -> dict[str, Any] | None:
    from phinetune.api import run_summary

    return dict(run_summary(run)) if run.summary.is_file() else None


def _relative(path: str | Path) -> Path:
    """The path as one would type it here."""
    whole = Path(path)
    return whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else whole
