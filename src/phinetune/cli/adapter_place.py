"""From the words of a command line to an adapter and its base. Prints nothing."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phinetune.base.errors import AdapterError, SettingsError, nearest

if TYPE_CHECKING:
    from phinetune.lora.forms import Form, Told
    from phinetune.lora.weights import AdapterWeights

FORMS = ("peft", "single", "loralib", "mlx")
ForceBase = Annotated[
    bool,
    typer.Option("--force-base", help="Take another base than the adapter's, where names and shapes fit."),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An adapter that was read, and from where."""

    weights: AdapterWeights
    form: Form
    path: Path
    told: Told


def read(
    place: Path,
    alpha: float | None,
    merged: list[str] | None,
    fan_in_fan_out: bool,
    *,
    takes_whole: bool = False,
) -> Found:
    """The adapter at a path or of a run; raises `UserError` naming what is wrong with it.

    With `takes_whole` it may hold more than updates: biases, modules, token rows.
    """
    from phinetune.lora.forms import Told, form_of, read_adapter
    from phinetune.lora.loralib_format import MergedParts

    parts = {}
    for text in merged or []:
        name, _, sizes = text.partition("=")
        try:
            parts[name] = MergedParts.from_text(sizes)
        except ValueError:
            raise SettingsError(
                f"'{text}' does not say the parts of a layer",
                where="--merged",
                do="write the layer's name, =, and the outputs of each part: qkv_proj=64,-64,64",
            ) from None
    told = Told(alpha=alpha, merged=parts, fan_in_fan_out=fan_in_fan_out)
    path = adapter_path(place)
    weights = read_adapter(path, told, takes_whole=takes_whole)
    return Found(weights=weights, form=form_of(path), path=path, told=told)


def told_options(alpha: float | None, merged: list[str] | None, fan_in_fan_out: bool) -> str:
    """The options that tell a command again what a state dict of loralib does not say."""
    words = ["--alpha", f"{alpha:g}"] if alpha is not None else []
    for text in merged or []:
        words += ["--merged", text]
    words += ["--fan-in-fan-out"] if fan_in_fan_out else []
    return "".join(f" {shlex.quote(word)}" for word in words)


def alpha_told(told: str) -> float:
    """The alpha in what a writer of loralib's form says its reader must be told."""
    return float(told.split(",")[0].removeprefix("lora_alpha="))


def adapter_path(place: Path) -> Path:
    """The adapter of a run folder or project, or the path itself."""
    from phinetune.runs.folder import find_run

    is_run = place.is_dir() and not (place / "adapter_config.json").exists()
    if is_run and ((place / "run.json").is_file() or (place / "runs").is_dir()):
        return find_run(place).adapter
    return place


def adapter_name(place: Path) -> str:
    """What an adapter is called beside others: its run's name, else its file's or folder's."""
    path = adapter_path(place)
    if path.is_dir():
        return path.resolve().parent.name if path.name == "adapter" else path.name
    return path.stem


def base_of(weights: AdapterWeights, base: str | None, where: str) -> str:
    """The base that was named, or the one the adapter names."""
    if base or weights.base_name:
        return base or weights.base_name
    raise AdapterError(
        "the adapter does not say which base it belongs to", where=where, do="name it: --base MODEL"
    )


def forced_words(difference: str) -> str:
    """What is printed where another base was forced."""
    return f"forced   another base than the adapter's: {difference}; its answers may mean nothing"


def is_here(name: str) -> bool:
    """Whether the base is on this machine without asking the network."""
    from phinetune.models.catalog import DEMO, demo_folder, weight_files

    folder = demo_folder() if name == DEMO else Path(name)
    return bool(name) and (folder / "config.json").is_file() and bool(weight_files(folder))


def laid_out(weights: AdapterWeights, layout: str, base: str | None, where: str) -> AdapterWeights:
    """The adapter with fused or with separate projections."""
    from phinetune.lora.fusing import fuse, split
    from phinetune.models.merged import part_sizes

    name = base or (weights.base_name if is_here(weights.base_name) else "")
    sizes = part_sizes(name) if name else {}
    laid_out = (fuse if layout == "fused" else split)(weights, sizes, where=where)
    # Its hash is that of the base it was trained on, which has the other layout.
    metadata = {key: text for key, text in weights.metadata.items() if key != "base_sha256"}
    return replace(laid_out, metadata=metadata)


def form_named(name: str) -> Form:
    """The form that `--to` names."""
    choice("--to", name, FORMS)
    return name  # type: ignore[return-value]


def choice(option: str, value: str | None, known: tuple[str, ...]) -> None:
    """Raise `SettingsError` unless the value is known."""
    if value is not None and value not in known:
        near = nearest(value, known)
        raise SettingsError(
            f"{option} cannot be '{value}'",
            where=option,
            do=f"write {near}" if near else f"write one of {', '.join(known)}",
        )
