"""The demo base's architecture and its training loss. Knows no data and no optimiser."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM

IGNORED = -100


def config(vocab_size: int, end_of_text: int, pad: int) -> Phi3Config:
    """Phi-3, small: 6 layers of width 256, tied embeddings."""
    return Phi3Config(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        original_max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        sliding_window=None,
        tie_word_embeddings=True,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attention_dropout=0.0,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=pad,
    )


def generation_config(end_of_text: int, end: int, pad: int) -> GenerationConfig:
    """Generation ends at `<|end|>` or `<|endoftext|>`."""
    return GenerationConfig(bos_token_id=end_of_text, eos_token_id=[end, end_of_text], pad_token_id=pad)


def build(cfg: Phi3Config, seed: int = 0) -> Phi3ForCausalLM:
    """Fresh fp32 weights; the two projections that write to the residual stream start small."""
    torch.manual_seed(seed)
    model = Phi3ForCausalLM(cfg)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_((2 * cfg.num_hidden_layers) ** -0.5)
    return model


def loss_sum(model: Phi3ForCausalLM, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """Sum of next-token losses in nats over targets that are not `IGNORED`; bf16 matrix products."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
        logits_NV = F.linear(hidden_BTD.flatten(0, 1), model.lm_head.weight)
    return F.cross_entropy(logits_NV.float(), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")
