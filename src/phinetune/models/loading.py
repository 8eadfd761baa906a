"""Load a base model, frozen, with segment attention, and run it on packed batches.

The model is transformers' own class, unchanged; any decoder-only language model will do.
Knows nothing of adapters, text or training.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from phinetune.base.errors import ModelError, SettingsError
from phinetune.kernels.products import has_tiles
from phinetune.models import attention, device
from phinetune.models.batch import PackedBatch
from phinetune.models.body import speed_up
from phinetune.models.catalog import find_model, refuse_quantized_files, weights_sha256
from phinetune.models.piecewise import load_quantized
from phinetune.models.quantized import Quantization, num_original_weights, require_quantizer

if TYPE_CHECKING:
    from phinetune.models.classifier import Classifier
    from phinetune.models.lower_states import LowerStates

# A CPU's matrix library prepares and keeps code for every new shape: about 30 MB a step for a small model,
# and time. An empty last segment makes the shapes few (40 steps: 22 % faster in 0.95 instead of 1.6 GB).
TOKENS_MULTIPLE = 128
# Products in tiles prepare nothing; what is left to the library are small ones.
TOKENS_MULTIPLE_WITH_TILES = 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Base:
    """A frozen base model and where it came from."""

    name: str
    folder: Path
    model: PreTrainedModel
    sha256: str
    compute: device.Compute
    num_parameters: int
    # How the linear layers of the blocks are kept; embeddings, norms and head have the type of `compute`.
    quantize: Quantization = "none"
    # The head of a classification, which then takes the place of the output head in the loss.
    classifier: Classifier | None = None
    # Known rows' states below the first trained block, which then need not be computed.
    lower: LowerStates | None = None

    @property
    def device(self) -> torch.device:
        return self.compute.device

    @property
    def dtype(self) -> torch.dtype:
        return self.compute.dtype

    @property
    def max_length(self) -> int:
        """Most tokens the model has positions for."""
        return int(getattr(self.model.config, "max_position_embeddings", 1 << 30))

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.vocab_size)

    @property
    def tokens_multiple(self) -> int:
        """The tokens of a batch are filled up to a multiple of this."""
        if self.device.type != "cpu":
            return 1
        return TOKENS_MULTIPLE_WITH_TILES if has_tiles(self.dtype, self.device) else TOKENS_MULTIPLE

    def hidden_states(self, batch: PackedBatch, rows_F: Tensor | None = None) -> Tensor:
        """The last hidden states, (T, hidden): what the output head turns into logits.

        Of the tokens `rows_F` only, (F, hidden), where they are given: the last block then spares what the
        others need after attention, if `models.body` knows the block.

        LongRoPE models (Phi-3.5, Phi-4-mini) have two sets of frequencies, and transformers chooses
        one for a whole forward by its longest position. Short and long segments therefore go
        through the model apart, so that each gets the set its own length implies.
        """
        limit = self.longrope_limit
        own = range(batch.num_examples)
        long = [segment for segment in own if limit and batch.whole_length(segment) > limit]
        if len(long) in (0, len(own)):
            return self._forward(batch, rows_F)
        hidden: dict[int, Tensor] = {}
        for kind in (long, [segment for segment in own if segment not in long]):
            # A prefix that both kinds continue is computed for both; nothing reads what it predicts.
            segments = batch.with_prefixes(kind)
            part = batch.part(segments)
            hidden |= zip(segments, self._forward(part).split(part.segment_lengths), strict=True)
        hidden_TH = torch.cat([hidden[segment] for segment in range(len(hidden))])
        return hidden_TH if rows_F is None else hidden_TH[rows_F]

    def head_logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits (N, vocabulary) of hidden states, in the base's type."""
        logits: Tensor = self.head(hidden_NH)
        if self.logit_softcap:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits

    @property
    def head(self) -> nn.Module:
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Module)
        return head

    @property
    def logit_softcap(self) -> float | None:
        """Gemma 2 squashes its logits; other models have none."""
        return getattr(self.model.config, "final_logit_softcapping", None)

    @contextlib.contextmanager
    def plain_attention(self) -> Iterator[None]:
        """Within the block the model uses transformers' attention with masks and a cache, for generation."""
        # Gemma 2 caps its attention scores, which PyTorch's fused attention cannot.
        has_sdpa = bool(getattr(self.model, "_supports_sdpa", False))
        self.model.set_attn_implementation("sdpa" if has_sdpa else "eager")
        try:
            yield
        finally:
            self.model.set_attn_implementation(attention.IMPLEMENTATION)

    @property
    def longrope_limit(self) -> int | None:
        """The longest segment that a LongRoPE model reads with its short factors; None for other models."""
        rope = getattr(self.model.config, "rope_parameters", None) or {}
        if rope.get("rope_type") != "longrope":
            return None
        return int(rope["original_max_position_embeddings"])

    def _forward(self, batch: PackedBatch, rows_F: Tensor | None = None) -> Tensor:
        decoder = self.model.get_decoder()
        filled = batch.filled(self.tokens_multiple)
        lower = self.lower.given(batch, filled.num_tokens) if self.lower else contextlib.nullcontext()
        # Fewer rows only, so that their number tells whether the last block has chosen them.
        is_sparing = rows_F is not None and len(rows_F) < filled.num_tokens
        with lower:
            out = decoder(
                input_ids=filled.ids_T[None],
                position_ids=filled.positions_T[None],
                use_cache=False,
                segment_lengths=filled.segment_lengths,
                segment_prefixes=filled.segment_prefixes,
                **({"wanted_rows": rows_F} if is_sparing else {}),
            )
        hidden: Tensor = out.last_hidden_state.squeeze(0)
        if rows_F is None:
            return hidden[: batch.num_tokens]
        return hidden if len(hidden) < filled.num_tokens else hidden[rows_F]


def load_base(
    spec: str,
    *,
    device_name: str = "auto",
    dtype: str = "auto",
    quantize: Quantization = "none",
    root: Path | None = None,
    is_sharded: bool = False,
) -> Base:
    """Load `demo`, a local folder or a Hugging Face model, frozen and in evaluation mode.

    With `quantize` its linear layers are kept in 8 or 4 bits (`models.quantized`); the output head is not.
    With `is_sharded` this process keeps its part of each block; all processes must do the same from here.

    Raises `ModelError` when it cannot be found or loaded, or when its logits are not simply the
    output head of its last hidden states, on which the loss is built.

    >>> base = load_base("demo", device_name="cpu", dtype="float32")
    >>> base.model.config.model_type
    'phi3'
    """
    if quantize != "none" and is_sharded:
        raise SettingsError(
            "a quantised base cannot be divided among processes",
            where="--shard",
            why="its codes are no weights that could be put together for a block",
            do="leave --shard out, or write quantize: none",
        )
    require_quantizer(quantize)
    folder = find_model(spec, root=root)
    compute = device.choose(device_name, dtype)
    model = _load(folder, compute, quantize, is_sharded)
    model.requires_grad_(False)
    model.eval()
    base = Base(
        name=spec,
        folder=folder,
        model=model,
        sha256=weights_sha256(folder),
        compute=compute,
        num_parameters=num_original_weights(model),
        quantize=quantize,
    )
    _check_head(base)
    return base


def _load(folder: Path, compute: device.Compute, quantize: Quantization, is_sharded: bool) -> PreTrainedModel:
    problems = _Problems()
    logger = transformers_logging.get_logger("transformers.modeling_utils")
    bar_was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    logger.addHandler(problems)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        refuse_quantized_files(folder)
        if quantize != "none":
            return speed_up(load_quantized(folder, config, quantize, compute))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            trust_remote_code=False,
            dtype=compute.dtype,
            attn_implementation=attention.IMPLEMENTATION,
            use_safetensors=True,
            output_loading_info=True,
        )
    except ModelError:
        raise
    # A folder can be wrong in any way, and transformers, safetensors and huggingface_hub each have
    # errors of their own for it.
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            "the model cannot be loaded",
            where=str(folder),
            why=" ".join(line.strip() for line in lines[:2]),
            do="check that it is a decoder-only language model with whole safetensors files",
        ) from error
    finally:
        logger.removeHandler(problems)
        if bar_was_on:
            transformers_logging.enable_progress_bar()
    model, info = loaded
    assert isinstance(model, PreTrainedModel)
    missing = sorted(info["missing_keys"])
    if missing or info["mismatched_keys"]:
        raise ModelError(
            "the model's weights are not complete",
            where=str(folder),
            why=f"{len(missing)} tensors are missing, for example {missing[0]}"
            if missing
            else f"shapes differ: {sorted(info['mismatched_keys'])[0]}",
            do="download the model again; it would train on random weights",
        )
    speed_up(model)
    if is_sharded:
        from phinetune.models.sharding import shard_blocks  # an import of its own: seldom needed, slow

        shard_blocks(model, compute.device)
    placed: PreTrainedModel = model.to(compute.device)  # type: ignore[arg-type]
    return placed


class _Problems(logging.Handler):
    """Swallows transformers' loading report; `_load` says the same as an error."""

    def emit(self, record: logging.LogRecord) -> None:
        pass


@torch.no_grad()
def _check_head(base: Base) -> None:
    """Compare our road to the logits with the model's own, on eight tokens."""
    ids_T = torch.arange(8, device=base.device) % base.vocab_size
    batch = PackedBatch(
        ids_T=ids_T, positions_T=torch.arange(8, device=base.device), targets_T=ids_T, segment_lengths=(8,)
    )
    ours = base.head_logits(base.hidden_states(batch)).float()
    with base.plain_attention():
        theirs = base.model(input_ids=ids_T[None], use_cache=False).logits[0].float()
    tolerance = 1e-3 if base.dtype == torch.float32 else 0.1
    spread = theirs.std().clamp(min=1e-6)
    # The mean, not the largest: two attentions in bfloat16 differ by a tenth somewhere in deep models.
    distance = (ours - theirs).square().mean().sqrt()
    if not (distance <= tolerance * spread + 1e-4):
        raise ModelError(
            f"models of type '{base.model.config.model_type}' are not supported",
            where=str(base.folder),
            why="their logits are not the output head applied to the last hidden states",
            do="choose a model whose head is plain, for example a Phi, Llama, Qwen or Mistral",
        )
