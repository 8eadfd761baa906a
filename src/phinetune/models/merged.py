"""Write a base model with an adapter in its weights, and measure what that changed.

Each weight is formed in float32 and rounded once to the base's type; shards are handled one at a time.
Knows nothing of text or training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from phinetune.base.errors import AdapterError, IncompatibleLowRankAdapter, UserError, nearest
from phinetune.base.files import committed_dir, require_free_space
from phinetune.lora.files import load_weights
from phinetune.lora.fusing import GATE_UP, QKV
from phinetune.lora.tensor_file import write_tensors
from phinetune.lora.weights import AdapterWeights, Update, last
from phinetune.lora.whole import ROWS
from phinetune.models.catalog import find_model, weight_files, weights_sha256
from phinetune.models.loading import load_base

_BESIDE = ("*.json", "*.jinja", "tokenizer.model", "LICENSE*")
_NUM_PROBES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What merging changed. Logits are those of 16 tokens, in float32.

    `weight_change` is the greatest change of one weight by target; `rounding` the greatest distance of
    a written weight from the exact one. `logit_error` compares base and adapter side by side with the
    merged model.
    """

    folder: Path
    num_layers: int
    weight_change: Mapping[str, float]
    rounding: float
    logit_change: float
    logit_error: float


def merge(
    weights: AdapterWeights, base: str, out: Path, *, where: str, subtract: bool = False
) -> MergeReport:
    """Write the folder `out`: the base with the adapter in it, or with `subtract` without it.

    Raises `IncompatibleLowRankAdapter` when the adapter is not of this base; nothing is written then.
    """
    folder = find_model(base)
    if out.exists():
        raise UserError("something is there already", where=str(out), do="name a new folder")
    if not subtract:
        _refuse_other_base(weights, base, where)
    if subtract and weights.is_alone:
        raise AdapterError(
            "DoRA cannot be taken out again"
            if weights.uses_dora
            else f"'{next(iter(weights.whole))}' was trained whole and cannot be taken out again",
            where=where,
            why="the lengths of the base's rows are gone" if weights.uses_dora else "the base's own is gone",
            do="use the base",
        )
    places = _places(weights, folder, where)
    whole = _whole_places(weights, folder, where)
    require_free_space(
        out.parent, sum(path.stat().st_size for path in weight_files(folder)), "a merged model"
    )
    changes: dict[str, float] = {}
    rounding = 0.0
    with committed_dir(out, has_manifest=False) as temporary:
        for shard in weight_files(folder):
            tensors, metadata = _read(shard)
            for key in tensors.keys() & places.keys():
                name = places[key]
                update = _signed(weights.updates[name], subtract)
                tensors[key], change, error = _merged(tensors[key], update, weights.is_transposed)
                changes[last(name)] = max(changes.get(last(name), 0.0), change)
                rounding = max(rounding, error)
            for key in tensors.keys() & whole.keys():
                tensors[key] = _replaced(tensors[key], weights, whole[key])
            write_tensors(temporary / shard.name, tensors, {"format": "pt", **metadata})
        for path in sorted({path for pattern in _BESIDE for path in folder.glob(pattern)}):
            if path.is_file():
                shutil.copyfile(path, temporary / path.name)
    logit_change, logit_error = _logits(weights, folder, out, where, subtract)
    return MergeReport(
        folder=out,
        num_layers=len(places),
        weight_change=dict(sorted(changes.items())),
        rounding=rounding,
        logit_change=logit_change,
        logit_error=logit_error,
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


def check_fit(weights: AdapterWeights, base: str, *, where: str) -> None:
    """Raise `IncompatibleLowRankAdapter` for another base by hash, or by names and shapes of its weights."""
    _refuse_other_base(weights, base, where)
    _places(weights, find_model(base), where)
    _whole_places(weights, find_model(base), where)


def _places(weights: AdapterWeights, folder: Path, where: str) -> dict[str, str]:
    """The tensor of the base that each update belongs to: tensor name to module path."""
    shapes = _shapes(folder)
    places = {}
    for name, update in weights.updates.items():
        key = _key(f"{name}.weight", shapes, name, where)
        shape = shapes[key][::-1] if weights.is_transposed else shapes[key]
        if shape != (update.out_features, update.in_features):
            raise IncompatibleLowRankAdapter(
                f"the update of '{name}' has the wrong shape",
                where=where,
                why=f"it is for ({update.out_features}, {update.in_features}), the base has {shape}",
                do="name the base it was trained on",
            )
        places[key] = name
    return places


def _whole_places(weights: AdapterWeights, folder: Path, where: str) -> dict[str, str]:
    """The tensor of the base that each weight trained whole takes the place of: tensor name to its name."""
    shapes = _shapes(folder) if weights.whole else {}
    places = {}
    for name, tensor in weights.whole.items():
        module, _, attribute = name.rpartition(".")
        is_rows = attribute == ROWS
        key = _key(f"{module}.weight" if is_rows else name, shapes, name, where)
        expected = (
            (len(weights.settings.trainable_token_indices), *shapes[key][1:]) if is_rows else shapes[key]
        )
        if tuple(tensor.shape) != expected:
            raise IncompatibleLowRankAdapter(
                f"'{name}' has the wrong shape",
                where=where,
                why=f"it is {tuple(tensor.shape)}, for this base it must be {expected}",
                do="name the base it was trained on",
            )
        if is_rows and not all(
            0 <= index < shapes[key][0] for index in weights.settings.trainable_token_indices
        ):
            raise IncompatibleLowRankAdapter(
                f"'{name}' is of tokens that the base does not have",
                where=where,
                why=f"its embedding has {shapes[key][0]} rows",
                do="name the base it was trained on",
            )
        places[key] = name
    return places


def _key(wanted: str, shapes: Mapping[str, tuple[int, ...]], name: str, where: str) -> str:
    # A checkpoint may have been saved from the inner model, without the first part of the path.
    key = next((key for key in (wanted, wanted.partition(".")[2]) if key in shapes), None)
    if key is None:
        raise IncompatibleLowRankAdapter(
            f"the adapter has weights for '{name}', which the base does not have",
            where=where,
            why=f"the nearest weight of the base is '{nearest(wanted, shapes)}'",
            do="name the base it was trained on; 'adapter convert --layout' changes fused and separate",
        )
    return key


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in weight_files(folder):
        with safe_open(shard, framework="pt") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return shapes


def _replaced(weight: Tensor, weights: AdapterWeights, name: str) -> Tensor:
    """The base's tensor with what was trained whole in it, in its own type."""
    trained = weights.whole[name].to(weight.dtype)
    if not name.endswith(f".{ROWS}"):
        return trained.contiguous()
    indices = torch.tensor(weights.settings.trainable_token_indices)
    return weight.index_copy(0, indices, trained)


def _refuse_other_base(weights: AdapterWeights, base: str, where: str) -> None:
    recorded, found = weights.metadata.get("base_sha256", ""), weights_sha256(find_model(base))
    if recorded and recorded != found:
        raise IncompatibleLowRankAdapter(
            "the adapter belongs to another base model",
            where=where,
            why=f"it was trained on weights {recorded[:12]}…, '{base}' has {found[:12]}…",
            do="name the base it was trained on with --base",
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
    free = replace(weights, metadata={})  # hash and shapes were checked above
    load_weights(model, free, where=where)
    return change, float((_probe(model, ids) - expected).abs().max())


def _probe(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits
