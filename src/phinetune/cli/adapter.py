"""`phinetune adapter`: look at adapters, convert, merge, add and check them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from phinetune.base.errors import IncompatibleLowRankAdapter, SettingsError
from phinetune.cli import console
from phinetune.cli.adapter_place import (
    ForceBase,
    alpha_told,
    base_of,
    choice,
    forced_words,
    form_named,
    is_here,
    laid_out,
    read,
    told_options,
)

adapter_app = typer.Typer(
    help="Look at adapters, convert, merge, add and check them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

LAYOUTS = ("fused", "split")
METHODS = ("cat", "linear", "svd")

Place = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="Adapter folder or file, or run folder.", show_default=False)
]
BaseName = Annotated[
    str | None,
    typer.Option(help="Base model; where it is not given, the one the adapter names.", show_default=False),
]
Alpha = Annotated[
    float | None,
    typer.Option(help="lora_alpha of a loralib state dict, which does not hold it.", show_default=False),
]
Merged = Annotated[
    list[str] | None,
    typer.Option(
        help="Parts of a loralib MergedLinear, a minus before those without an update: qkv_proj=64,-64,64.",
        show_default=False,
    ),
]
FanInFanOut = Annotated[
    bool, typer.Option("--fan-in-fan-out", help="The loralib layers keep their weight as (in, out).")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")]


@adapter_app.command()
def show(
    place: Place,
    alpha: Alpha = None,
    merged: Merged = None,
    fan_in_fan_out: FanInFanOut = False,
    json: Json = False,
) -> None:
    """Show what an adapter holds: layers, ranks, scales, parameters and which base it belongs to."""
    from phinetune.cli.adapter_view import adapter_record, show_adapter

    found = read(place, alpha, merged, fan_in_fan_out, takes_whole=True)
    if json:
        console.print_json(adapter_record(found.weights, found.form, found.path))
        return
    show_adapter(found.weights, found.form, found.path)
    console.next_commands(
        f"phinetune adapter check {shlex.quote(str(place))}{told_options(alpha, merged, fan_in_fan_out)}"
    )


@adapter_app.command()
def convert(
    place: Place,
    out: Annotated[Path, typer.Argument(help="New file or folder.", show_default=False)],
    to: Annotated[str, typer.Option(help="peft, single (one .safetensors), loralib (.pt) or mlx.")] = "peft",
    layout: Annotated[
        str | None,
        typer.Option(help="fused or split: projections as the base has them.", show_default=False),
    ] = None,
    fold: Annotated[
        bool, typer.Option("--fold", help="Put scales that differ into B: readers know alpha / r alone.")
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Cut to the nearest update of this rank.", show_default=False),
    ] = None,
    base: BaseName = None,
    alpha: Alpha = None,
    merged: Merged = None,
    fan_in_fan_out: FanInFanOut = False,
    json: Json = False,
) -> None:
    """Write an adapter in another form or layout; exact, but for --rank. Fusing folds as --fold."""
    from phinetune.lora.combining import reranked
    from phinetune.lora.forms import write_adapter

    form = form_named(to)
    choice("--layout", layout, LAYOUTS)
    found = read(place, alpha, merged, fan_in_fan_out, takes_whole=True)
    weights, losses = found.weights, None
    if layout:
        weights = laid_out(weights, layout, base, str(place))
    if rank:
        weights, losses = reranked(weights, rank)
    if fold or layout == "fused":
        weights = weights.folded()
    told = write_adapter(weights, out, form, found.told)
    loss = max(losses.values()) if losses else None
    if json:
        console.print_json({"form": form, "path": str(out), "told": told, "greatest_loss": loss})
        return
    console.say(f"adapter  {out}", f"form     {form}")
    if told:
        console.say(f"tell     whoever loads it: {told}")
    if loss is not None:
        console.say(f"lost     at most {loss:.2%} of the size of one layer's update")
    options = told_options(alpha_told(told), merged, found.weights.is_transposed) if told else ""
    console.next_commands(f"phinetune adapter check {shlex.quote(str(out))}{options}")


@adapter_app.command()
def merge(
    place: Place,
    out: Annotated[Path, typer.Argument(help="New model folder.", show_default=False)],
    base: BaseName = None,
    subtract: Annotated[
        bool, typer.Option("--subtract", help="Take the adapter out of --base, a model it was merged into.")
    ] = False,
    force_base: ForceBase = False,
    alpha: Alpha = None,
    merged: Merged = None,
    fan_in_fan_out: FanInFanOut = False,
    json: Json = False,
) -> None:
    """Write the base with the adapter in its weights, and measure what that changed."""
    from phinetune.cli.adapter_view import merge_record, show_merge
    from phinetune.models.merged import merge as merge_into

    if subtract and not base:
        raise SettingsError(
            "the model to take the adapter out of is not named",
            where="--subtract",
            why="the base that the adapter names does not have it in",
            do="name the merged model: --base MODEL",
        )
    found = read(place, alpha, merged, fan_in_fan_out, takes_whole=True)
    name = base_of(found.weights, base, str(place))
    console.note(f"plan     {len(found.weights.updates)} layers of {name}, one shard at a time", style="dim")
    report = merge_into(found.weights, name, out, where=str(place), subtract=subtract, force_base=force_base)
    if report.forced:
        console.note(forced_words(report.forced), style="yellow")
    if json:
        console.print_json(merge_record(report))
        return
    show_merge(report)
    console.next_commands(f"phinetune chat {shlex.quote(str(out))}")


@adapter_app.command()
def add(
    places: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER…", help="Adapters of one base.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="New folder.", show_default=False)],
    factor: Annotated[
        list[float] | None,
        typer.Option(help="One per adapter; 1 each when none is given.", show_default=False),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="cat: the exact sum, ranks add up. svd: the sum cut to --rank, else to the "
            "adapters' greatest. linear: A and B apart, keeps the rank."
        ),
    ] = "cat",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Cut the sum to this rank.", show_default=False)
    ] = None,
) -> None:
    """Add adapters of one base, each times a factor, into a new PEFT folder."""
    from phinetune.lora.combining import concatenated, linear, reranked
    from phinetune.lora.forms import write_adapter

    choice("--method", method, METHODS)
    adapters = [read(place, None, None, False).weights for place in places]
    factors = factor or [1.0] * len(adapters)
    total = (linear if method == "linear" else concatenated)(adapters, factors)
    if method == "svd" and not rank:
        rank = max(update.rank for weights in adapters for update in weights.updates.values())
    if rank:
        total, losses = reranked(total, rank)
        console.note(f"lost     at most {max(losses.values()):.2%} of the size of one layer's update")
    write_adapter(total, out, "peft")
    console.say(f"adapter  {out}", f"rank     {total.settings.rank}")
    console.next_commands(f"phinetune adapter check {shlex.quote(str(out))}")


@adapter_app.command()
def check(
    place: Place,
    base: BaseName = None,
    force_base: ForceBase = False,
    alpha: Alpha = None,
    merged: Merged = None,
    fan_in_fan_out: FanInFanOut = False,
    json: Json = False,
) -> None:
    """Check that an adapter is sound and fits its base, and say which engines will run it."""
    from phinetune.cli.adapter_view import check_record, show_check
    from phinetune.lora.servability import is_separate_on_fused, servability
    from phinetune.models.merged import check_fit, model_type_of

    found = read(place, alpha, merged, fan_in_fan_out)
    name = base or found.weights.base_name
    fits, model_type, misfit = False, "", None
    if base or is_here(name):
        model_type = model_type_of(name)
        try:
            forced = check_fit(found.weights, name, where=str(place), force_base=force_base)
            fits = True
        except IncompatibleLowRankAdapter as error:
            # Then the engines' answers are of use all the same: they say what to convert.
            if not is_separate_on_fused(found.weights, model_type):
                raise
            forced, misfit = "", error
        if forced:
            console.note(forced_words(forced), style="yellow")
    verdicts = servability(found.weights, found.form, model_type)
    if json:
        console.print_json(check_record(found.weights, found.form, name if fits else "", verdicts))
    else:
        show_check(found.weights, found.form, name, fits, verdicts)
    if misfit:
        raise misfit
