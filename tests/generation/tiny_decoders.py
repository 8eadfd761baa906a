"""Random tiny decoders in float32, one per architecture that generation must agree with."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class TinyBase:
    """Stands for a loaded base model."""

    model: Any


def tiny_base(name: str, seed: int = 0) -> TinyBase:
    torch.manual_seed(seed)
    if name == "phi3":
        return TinyBase(Phi3ForCausalLM(Phi3Config(**SIZES)).eval())
    if name == "phi3-window":
        return TinyBase(Phi3ForCausalLM(Phi3Config(**SIZES, sliding_window=9)).eval())
    if name == "phi3-longrope":
        config = Phi3Config(**SIZES, original_max_position_embeddings=24, rope_parameters=LONG_ROPE)
        return TinyBase(Phi3ForCausalLM(config).eval())
    if name == "llama":
        return TinyBase(LlamaForCausalLM(LlamaConfig(**SIZES)).eval())
    if name == "qwen2":
        return TinyBase(Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval())
    if name == "mistral":
        return TinyBase(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=9)).eval())
    if name == "gpt2":
        config = GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return TinyBase(GPT2LMHeadModel(config).eval())
    raise AssertionError(name)


ARCHITECTURES = ["phi3", "phi3-window", "phi3-longrope", "llama", "qwen2", "mistral", "gpt2"]
