"""The command `phinetune`: the table of commands, and the one place where errors become exit codes.

Imports nothing heavy: each command loads what it needs when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from phinetune.base.errors import PhinetuneError, UserError, nearest
from phinetune.cli import console
from phinetune.cli.adapter import adapter_app
from phinetune.cli.chat import chat
from phinetune.cli.classify import classify
from phinetune.cli.compare import compare
from phinetune.cli.data import data_app
from phinetune.cli.doctor import doctor
from phinetune.cli.evaluate import evaluate
from phinetune.cli.new import new
from phinetune.cli.quickstart import quickstart
from phinetune.cli.report import report
from phinetune.cli.runs import runs_app
from phinetune.cli.train import train


class CommandGroup(TyperGroup):
    """A group that answers an unknown command in our form, with the nearest name."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            near = nearest(name, self.list_commands(ctx))
            raise UserError(
                f"there is no command '{name}'",
                why=f"the commands are: {', '.join(self.list_commands(ctx))}",
                do=f"write '{ctx.command_path} {near}'" if near else f"see '{ctx.command_path} --help'",
            )
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=CommandGroup,
    help="Fine-tune small language models with LoRA on your own machine, and see whether it helped.",
    epilog="Start with: phinetune quickstart my-first-run",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from phinetune import __version__

        console.say(f"phinetune {__version__}")
        console.stop(console.DONE)


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    pass


for command in (quickstart, new, train, evaluate, compare, chat, classify, report, doctor):
    app.command()(command)
app.add_typer(data_app, name="data", cls=CommandGroup)
app.add_typer(adapter_app, name="adapter", cls=CommandGroup)
app.add_typer(runs_app, name="runs", cls=CommandGroup)


def run(args: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0 done, 1 failed, 2 user's input, 130 or 143 stopped."""
    console.prepare_streams()
    command = typer.main.get_command(app)
    try:
        code = command.main(args=list(args) or ["--help"], prog_name="phinetune", standalone_mode=False)
        if code == console.INTERRUPTED:  # how the parser reports Ctrl-C
            console.note("interrupted", style="yellow")
        return code if isinstance(code, int) else console.DONE
    except console.Interrupted as interruption:
        console.note(str(interruption), style="yellow")
        return interruption.exit_code
    except typer.TyperException as error:
        if not error.format_message().strip():
            return console.DONE  # a group without a command: its help has been printed
        console.show_error(_usage_error(error))
        return console.USER_INPUT
    except PhinetuneError as error:
        console.show_error(error)
        return console.exit_code_of(error)
    except (KeyboardInterrupt, typer.Abort):
        console.note("interrupted", style="yellow")
        return console.INTERRUPTED
    except BrokenPipeError:
        return _pipe_closed()
    except OSError as error:
        known = console.from_os_error(error)
        console.show_error(known)
        return console.exit_code_of(known)
    except Exception as error:  # the outermost door: nothing above it could show the error
        console.show_unexpected(error)
        return console.FAILED


def _pipe_closed() -> int:
    """The reader of our output went away (`phinetune … | head`): leave quietly."""
    import os

    # Python flushes standard output at exit and would complain about the closed pipe.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return console.FAILED


def _usage_error(error: typer.TyperException) -> UserError:
    """What the parser refused, in our form; an unknown option with the nearest one."""
    context: Any = getattr(error, "ctx", None)
    path = context.command_path if context else "phinetune"
    do = f"see '{path} --help'"
    option = getattr(error, "option_name", None)
    if context and option and type(error).__name__ == "NoSuchOption":
        known = [name for parameter in context.command.params for name in parameter.opts if name[:2] == "--"]
        near = nearest(option, [*known, "--help"])
        return UserError(
            f"'{path}' has no option '{option}'",
            why=f"it has: {', '.join([*known, '--help'])}",
            do=f"write '{near}'" if near else do,
        )
    message = error.format_message().strip().rstrip(".")
    return UserError(message[:1].lower() + message[1:], where=path, do=do)
