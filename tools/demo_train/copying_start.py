"""Starting weights from which copying is learnt at once, set by hand. Knows no data and no optimiser.

Left to training, "what followed this word last time?" had not come after 5 million tokens. So training
starts with the circuit that does it (an induction circuit), rough but working, and training refines it:
  layer 0, heads 0 and 1 attend to the token before and write it into two subspaces of the residual stream;
  layer 2, heads 0 to 3 compare the current token with those subspaces and copy what stands at the match.
One dimension is constant over all tokens: rotary positions turn it into "one step back". Ids that spell the
same word but for a leading space or capitals start with similar embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Phi3ForCausalLM

SCALE = 0.05  # spread of the embeddings
CONSTANT = 8.0  # the constant dimension, in spreads
SHARED = 0.75  # weight of what words share with their variants
POSITION_GAIN = 1.2
MATCH_GAIN = 3.5
WRITE_GAIN = 1.6
COPY_GAIN = 6.0
FAST_PAIRS = 10  # rotary pairs that tell one step from two
MATCH_SIZE = 24  # content dimensions compared by one head, in slow rotary pairs


def set_copying_start(model: Phi3ForCausalLM, spellings: list[str], seed: int = 0) -> None:
    """Overwrite the embeddings and six heads of `model` in place; `spellings[i]` is the text of id `i`."""
    random = torch.Generator().manual_seed(seed)
    width, heads = model.config.hidden_size, model.config.num_attention_heads
    size = width // heads
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(_embeddings(spellings, width, random))
        basis, turned = _orthonormal(width, random), _orthonormal(width, random)
        reads = [basis[:size], basis[size : 2 * size]]
        writes = [turned[:size], turned[size : 2 * size]]
        for head in range(2):
            _set_previous_token_head(model, head, size, reads[head], writes[head])
        for head in range(heads):
            group, part = head % 2, head // 2
            rows = slice(part * MATCH_SIZE, (part + 1) * MATCH_SIZE)
            copied = torch.zeros(size, width)
            block = basis[head * size : (head + 1) * size]
            copied[: len(block)] = block
            _set_match_head(model, head, size, reads[group][rows], writes[group][rows], copied)


def _orthonormal(width: int, random: torch.Generator) -> Tensor:
    """Rows [width - 1, width] at right angles to each other and to the constant dimension."""
    rows = torch.linalg.qr(torch.randn(width - 1, width - 1, generator=random)).Q
    return torch.cat([torch.zeros(width - 1, 1), rows], 1)


def _embeddings(spellings: list[str], width: int, random: torch.Generator) -> Tensor:
    words = [text.strip().casefold() for text in spellings]
    index = {word: i for i, word in enumerate(dict.fromkeys(words))}
    shared = torch.randn(len(index), width, generator=random)[[index[word] for word in words]]
    own = torch.randn(len(words), width, generator=random)
    embeddings: Tensor = SCALE * (SHARED * shared + (1 - SHARED**2) ** 0.5 * own)
    embeddings[:, 0] = SCALE * CONSTANT
    return embeddings


def _parts(model: Phi3ForCausalLM, layer: int, head: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of a head's query, key and value rows [size, width] and of its output columns [width, size]."""
    attention = model.model.layers[layer].self_attn
    query, key, value = (part[head * size : (head + 1) * size] for part in attention.qkv_proj.weight.chunk(3))
    return query, key, value, attention.o_proj.weight[:, head * size : (head + 1) * size]


def _set_previous_token_head(
    model: Phi3ForCausalLM, head: int, size: int, read: Tensor, write: Tensor
) -> None:
    query, key, value, output = _parts(model, 0, head, size)
    half = size // 2
    frequencies = 10_000.0 ** (-torch.arange(half) / half)
    fast = torch.arange(half) < FAST_PAIRS
    query.zero_()
    key.zero_()
    # rotated by one step, the query meets the key of the position before
    query[:half, 0] = POSITION_GAIN * fast * torch.cos(frequencies)
    query[half:, 0] = POSITION_GAIN * fast * -torch.sin(frequencies)
    key[:half, 0] = POSITION_GAIN * fast
    value.copy_(read)
    output.copy_(SCALE * WRITE_GAIN * write.T)


def _set_match_head(
    model: Phi3ForCausalLM, head: int, size: int, current: Tensor, previous: Tensor, copied: Tensor
) -> None:
    query, key, value, output = _parts(model, 2, head, size)
    half, part = size // 2, MATCH_SIZE // 2
    slow = [*range(half - part, half), *range(size - part, size)]
    query.zero_()
    key.zero_()
    query[slow] = MATCH_GAIN * current
    key[slow] = MATCH_GAIN * previous
    value.copy_(copied)
    output.copy_(SCALE * COPY_GAIN * copied.T)
