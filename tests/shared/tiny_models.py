"""Random tiny models in float32, one per architecture, and random examples for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from phinetune.data.conversation import Source
from phinetune.models import attention
from phinetune.models.device import Compute
from phinetune.models.loading import Base
from phinetune.text.render import Rendered

VOCAB = 97
# LongRoPE models change their frequencies for segments longer than this.
SHORT_CONTEXT = 32
CPU = Compute(device=torch.device("cpu"), dtype=torch.float32, reason="a test")

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}


def _longrope(num_frequencies: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": SHORT_CONTEXT,
        "short_factor": [1.0 + 0.1 * i for i in range(num_frequencies)],
        "long_factor": [2.0 + i for i in range(num_frequencies)],
    }


ARCHITECTURES = (
    "phi3",
    "phi3-window",
    "phi3.5-longrope",
    "phi4-mini",
    "llama",
    "qwen2",
    "qwen3",
    "mistral-window",
    "gemma",
    "gemma2",
    "gemma3",
    "smollm3",
    "gpt2",
)
# Mixtures of experts: what the experts hold are no linear layers.
MIXTURES = ("mixtral", "qwen3-moe")


def tiny_config(name: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of one of `ARCHITECTURES` or `MIXTURES`."""
    match name:
        case "phi3":
            return Phi3Config(**{**_SIZES, **changes})
        case "phi3-window":
            return Phi3Config(**{**_SIZES, "sliding_window": 8, **changes})
        case "phi3.5-longrope":
            longrope = {"original_max_position_embeddings": SHORT_CONTEXT, "rope_parameters": _longrope(4)}
            return Phi3Config(**{**_SIZES, **longrope, **changes})
        case "phi4-mini":
            # Grouped heads, rotary positions on three quarters of each head, a tied output head.
            longrope = {
                "original_max_position_embeddings": SHORT_CONTEXT,
                "rope_parameters": {**_longrope(3), "partial_rotary_factor": 0.75},
                "partial_rotary_factor": 0.75,
                "tie_word_embeddings": True,
            }
            return Phi3Config(**{**_GROUPED, **longrope, **changes})
        case "llama":
            return LlamaConfig(**{**_GROUPED, **changes})
        case "qwen2":
            return Qwen2Config(**{**_GROUPED, **changes})
        case "qwen3":
            return Qwen3Config(**{**_GROUPED, "head_dim": 8, **changes})
        case "mistral-window":
            return MistralConfig(**{**_GROUPED, "sliding_window": 8, **changes})
        case "gemma2":
            # Small caps, so that they bite on small numbers.
            caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}
            return Gemma2Config(
                **{
                    **_GROUPED,
                    "head_dim": 8,
                    "sliding_window": 8,
                    "query_pre_attn_scalar": 8,
                    **caps,
                    **changes,
                }
            )
        case "gemma":
            return GemmaConfig(**{**_GROUPED, "head_dim": 8, **changes})
        case "gemma3":
            # Two kinds of layers with rotary frequencies of their own, an embedding that scales itself.
            kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
            return Gemma3TextConfig(
                **{**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, **kinds, **changes}
            )
        case "smollm3":
            return SmolLM3Config(**{**_GROUPED, "no_rope_layers": [1, 0], **changes})
        case "mixtral":
            experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
            return MixtralConfig(**{**_GROUPED, **experts, **changes})
        case "qwen3-moe":
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
            return Qwen3MoeConfig(**{**_GROUPED, "head_dim": 8, **experts, **changes})
        case "gpt2":
            no_dropout = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
            sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
            special = {"bos_token_id": 1, "eos_token_id": 2}
            return GPT2Config(**{"vocab_size": VOCAB, **sizes, **no_dropout, **special, **changes})
    raise AssertionError(name)


def tiny_model(
    name: str, *, seed: int = 0, implementation: str = attention.IMPLEMENTATION, **changes: Any
) -> Any:
    """A random model in evaluation mode; no weight, bias or norm is left at its plain value."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        tiny_config(name, **changes), attn_implementation=implementation, dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def as_base(model: Any) -> Base:
    """A model as it comes out of loading: frozen."""
    return Base(
        name="tiny",
        folder=Path("tiny"),
        model=model.requires_grad_(False),
        sha256="",
        compute=CPU,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def tiny_base(name: str = "phi3", *, seed: int = 0, **changes: Any) -> Base:
    return as_base(tiny_model(name, seed=seed, **changes))


def random_rows(lengths: Sequence[int], *, seed: int = 0, vocab: int = VOCAB) -> list[Rendered]:
    """Random ids; about half of the tokens of each row are trained, at least one."""
    rng = np.random.default_rng(seed)
    rows = []
    for number, length in enumerate(lengths, start=1):
        trained = rng.random(length) < 0.5
        trained[0], trained[-1] = False, True
        ids = rng.integers(0, vocab, length).astype(np.int32)
        rows.append(Rendered(ids=ids, trained=trained, source=Source(file="tiny.json", line=number)))
    return rows
