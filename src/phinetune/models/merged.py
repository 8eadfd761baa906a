"""Write a base model with an adapter in its weights, and measure what that changed.

Each weight is formed in float32 and rounded once to the base's type; shards are handled one at a time.
Knows nothing of text or training.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from phinetune.base.errors import AdapterError, IncompatibleLowRankAdapter, UserError
from phinetune.base.files import committed_dir, require_free_space
from phinetune.lora.files import base_difference, check_base, load_weights
from phinetune.lora.fusing import FUSIONS, GATE_UP, QKV
from phinetune.lora.tensor_file import write_tensors
from phinetune.lora.weights import AdapterWeights, Update, last, require_no_head
from phinetune.models.catalog import find_model, refuse_quantized_files, weight_files, weights_sha256
from phinetune.models.loading import load_base
from phinetune.models.merged_whole import replaced, shapes_of, tensor_of, whole_places
from phinetune.models.transposed import transposed_layers
from phinetune.models.unmerging import greatest_difference, measured_difference, original_of

_BESIDE = ("*.json", "*.jinja", "tokenizer.model", "LICENSE*")
_NUM_PROBES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What merging changed. Logits are those of 16 tokens, in float32.

    `weight_change` is the greatest change of one weight by target; `rounding` the greatest distance of
    a written weight from the exact one. `logit_error` compares base and adapter side by side with the
    merged model. `base_difference`, when an adapter was taken
    out, is the greatest distance of a weight from the base's: measured, or else the most it can be.
    `forced` says in words which other base the adapter was trained on, where that was overridden.
    """

    folder: Path
    num_layers: int
    weight_change: Mapping[str, float]
    rounding: float
    logit_change: float
    logit_error: float
    base_difference: float | None = None
    is_difference_measured: bool = False
    forced: str = ""


def merge(
    weights: AdapterWeights,
    base: str,
    out: Path,
    *,
    where: str,
    subtract: bool = False,
    force_base: bool = False,
) -> MergeReport:
    """Write the folder `out`: the base with the adapter in it, or with `subtract` without it.

    Raises `IncompatibleLowRankAdapter` when the adapter is not of this base; nothing is written then.
    With `force_base` another base is taken too, where it has the adapter's names and shapes. The base is
    the one of the files, in its original precision, also for an adapter that was trained on a quantised one:
    codes of a merged weight would be rounded a second time. Raises `ModelError` when the files themselves
    are quantised.
    """
    folder = find_model(base)
    refuse_quantized_files(folder)
    if out.exists() or out.is_symlink():
        raise UserError("something is there already", where=str(out), do="name a new folder")
    require_no_head(weights, where)
    forced = ""
    if subtract:
        _refuse_to_subtract(weights, base, where)
    elif force_base:
        forced = base_difference(weights, weights_sha256(folder))
    else:
        check_base(weights, where=where, base_sha256=weights_sha256(folder))
    places = _places(weights, folder, where)
    whole = whole_places(weights, folder, where)
    transposed = transposed_layers(folder)
    require_free_space(
        out.parent, sum(path.stat().st_size for path in weight_files(folder)), "a merged model"
    )
    changes: dict[str, float] = {}
    rounding = furthest = 0.0
    with committed_dir(out, has_manifest=False) as temporary:
        for shard in weight_files(folder):
            tensors, metadata = _read(shard)
            for key in tensors.keys() & places.keys():
                name = places[key]
                update = _signed(weights.updates[name], subtract)
                before = tensors[key]
                tensors[key], change, error = _merged(before, update, name in transposed)
                if subtract:
                    furthest = max(furthest, greatest_difference(before, tensors[key]))
                changes[last(name)] = max(changes.get(last(name), 0.0), change)
                rounding = max(rounding, error)
            for key in tensors.keys() & whole.keys():
                tensors[key] = replaced(tensors[key], weights, whole[key])
            write_tensors(temporary / shard.name, tensors, {"format": "pt", **metadata})
        for path in sorted({path for pattern in _BESIDE for path in folder.glob(pattern)}):
            if path.is_file():
                shutil.copyfile(path, temporary / path.name)
    logit_change, logit_error = _logits(weights, folder, out, where, subtract)
    original = original_of(weights) if subtract else None
    return MergeReport(
        folder=out,
        num_layers=len(places),
        weight_change=dict(sorted(changes.items())),
        rounding=rounding,
        logit_change=logit_change,
        logit_error=logit_error,
        base_difference=measured_difference(out, original) if original else furthest if subtract else None,
        is_difference_measured=original is not None,
        forced=forced,
    )


def part_sizes(base: str) -> dict[str, tuple[int, ...]]:
    """The rows of q, k, v and of gate, up in this base's fused projections, by fused name."""
    config = json.loads((find_model(base) / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    keys = (config.get("num_key_value_heads") or heads) * width
    return {
        QKV.fused: (heads * width, keys, keys),
        GATE_UP.fused: (config["intermediate_size"], config["intermediate_size"]),
    }


def model_type_of(base: str) -> str:
    """What transformers calls the architecture of this base."""
    config: dict[str, Any] = json.loads((find_model(base) / "config.json").read_text(encoding="utf-8"))
    return str(config.get("model_type", ""))


def check_fit(weights: AdapterWeights, base: str, *, where: str, force_base: bool = False) -> str:
    """Raise `IncompatibleLowRankAdapter` for another base by hash, or by names and shapes of its weights.

    With `force_base` the hash is not a reason; what it would have said is returned.
    """
    folder = find_model(base)
    digest = weights_sha256(folder)
    if not force_base:
        check_base(weights, where=where, base_sha256=digest)
    _places(weights, folder, where)
    whole_places(weights, folder, where)
    return base_difference(weights, digest)


def _places(weights: AdapterWeights, folder: Path, where: str) -> dict[str, str]:
    """The tensor of the base that each update belongs to: tensor name to module path."""
    transposed = transposed_layers(folder)
    shapes = shapes_of(folder)
    places = {}
    for name, update in weights.updates.items():
        key = tensor_of(f"{name}.weight", shapes, name, where, do=_how_to_fit(name, shapes, where))
        shape = shapes[key][::-1] if name in transposed else shapes[key]
        if shape != (update.out_features, update.in_features):
            raise IncompatibleLowRankAdapter(
                f"the update of '{name}' has the wrong shape",
                where=where,
                why=f"it is for ({update.out_features}, {update.in_features}), the base has {shape}",
                do="name the base it was trained on",
            )
        places[key] = name
    return places


def _how_to_fit(name: str, shapes: Mapping[str, object], where: str) -> str:
    """Another layout of the same base, or another base."""
    for fusion in FUSIONS:
        parent = name.removesuffix(last(name))
        parts = {f"{parent}{part}.weight" for part in fusion.parts}
        if last(name) in fusion.parts and f"{parent}{fusion.fused}.weight" in shapes:
            return f"phinetune adapter convert {shlex.quote(where)} NEW --layout fused"
        if last(name) == fusion.fused and parts <= shapes.keys():
            return f"phinetune adapter convert {shlex.quote(where)} NEW --layout split"
    return "name the base it was trained on"


def _refuse_to_subtract(weights: AdapterWeights, base: str, where: str) -> None:
    if weights.is_alone:
        raise AdapterError(
            "DoRA cannot be taken out again"
            if weights.uses_dora
            else f"'{next(iter(weights.whole))}' was trained whole and cannot be taken out again",
            where=where,
            why="the lengths of the base's rows are gone" if weights.uses_dora else "the base's own is gone",
            do="use the base",
        )
    if weights.base_sha256 and weights.base_sha256 == weights_sha256(find_model(base)):
        raise AdapterError(
            "the adapter is not in this model",
            where=where,
            why=f"'{base}' has the very weights that the adapter was trained on",
            do="name the merged model with --base",
        )


def _signed(update: Update, subtract: bool) -> Update:
    if not subtract:
        return update
    return Update(a_RI=update.a_RI, b_OR=update.b_OR, scaling=-update.scaling)


def _read(shard: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(shard, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def _merged(weight: Tensor, update: Update, is_transposed: bool) -> tuple[Tensor, float, float]:
    """The new weight in the old one's type, its greatest change, its greatest distance from the exact one."""
    weight_OI = weight.t() if is_transposed else weight
    exact_OI = update.merged_OI(weight_OI)
    exact = (exact_OI.t() if is_transposed else exact_OI).contiguous()
    written = exact.to(weight.dtype)
    change = float((exact - weight.float()).abs().max())
    return written, change, float((written.float() - exact).abs().max())


@torch.no_grad()
def _logits(
    weights: AdapterWeights, folder: Path, out: Path, where: str, subtract: bool
) -> tuple[float, float]:
    base = load_base(str(folder), device_name="cpu", dtype="float32")
    ids = torch.arange(_NUM_PROBES)[None] * 37 % base.vocab_size
    merged_model = load_base(str(out), device_name="cpu", dtype="float32")
    before, merged = (_probe(model.model, ids) for model in (base, merged_model))
    change = float((merged - before).abs().max())
    # Taken out: the result with the adapter attached must answer as what we began with.
    model, expected = (merged_model.model, before) if subtract else (base.model, merged)
    load_weights(model, weights, where=where)
    return change, float((_probe(model, ids) - expected).abs().max())


def _probe(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits
