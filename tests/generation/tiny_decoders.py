"""Random tiny decoders in float32, one per architecture that generation must agree with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from phinetune.models import attention
from phinetune.models.device import Compute
from phinetune.models.loading import Base

VOCAB = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Large weights give clear winners: a greedy choice must not hang on the last bit of a sum.
    "initializer_range": 0.3,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 24,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}


def tiny_base(name: str, seed: int = 0) -> Base:
    """A base as it comes out of loading: frozen, with segment attention."""
    torch.manual_seed(seed)
    return as_base(_model(name))


def as_base(model: Any) -> Base:
    model.requires_grad_(False).eval().set_attn_implementation(attention.IMPLEMENTATION)
    return Base(
        name="tiny",
        folder=Path("tiny"),
        model=model,
        sha256="",
        compute=Compute(device=torch.device("cpu"), dtype=torch.float32, reason="a test"),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _model(name: str) -> Any:
    match name:
        case "phi3":
            return Phi3ForCausalLM(Phi3Config(**SIZES))
        case "phi3-window":
            return Phi3ForCausalLM(Phi3Config(**SIZES, sliding_window=9))
        case "phi3-longrope":
            return Phi3ForCausalLM(
                Phi3Config(**SIZES, original_max_position_embeddings=24, rope_parameters=LONG_ROPE)
            )
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**SIZES))
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**SIZES))
        case "mistral":
            return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=9))
        case "gpt2":
            names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
            names |= {"max_position_embeddings": "n_positions"}
            sizes = {names.get(key, key): value for key, value in SIZES.items()}
            del sizes["intermediate_size"], sizes["num_key_value_heads"]
            return GPT2LMHeadModel(GPT2Config(**sizes))
    raise AssertionError(name)


ARCHITECTURES = ["phi3", "phi3-window", "phi3-longrope", "llama", "qwen2", "mistral", "gpt2"]
