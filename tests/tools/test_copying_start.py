"""The starting weights already copy: what followed an id last time is what they expect next."""

from __future__ import annotations

import torch
from demo_train.copying_start import set_copying_start
from demo_train.model import build, config

VOCAB_SIZE = 512


def test_an_untrained_model_expects_a_repeated_block_to_go_on_as_before() -> None:
    model = build(config(VOCAB_SIZE, end_of_text=0, pad=1))
    set_copying_start(model, [f"word{i}" for i in range(VOCAB_SIZE)])
    generator = torch.Generator().manual_seed(3)
    block_BT = torch.randint(6, VOCAB_SIZE, (4, 20), generator=generator)
    ids_BT = torch.cat([block_BT, block_BT], 1)
    with torch.no_grad():
        guesses_BT = model(input_ids=ids_BT).logits.argmax(-1)
    right = (guesses_BT[:, 20:-1] == ids_BT[:, 21:]).float().mean()
    assert right > 0.7


def test_variants_of_a_word_start_alike() -> None:
    model = build(config(8, end_of_text=0, pad=1))
    set_copying_start(model, ["a", "b", "c", "d", "Lamp", " lamp", "chair", " Lamp"])
    rows = model.model.embed_tokens.weight[:, 1:]
    lamp = torch.nn.functional.cosine_similarity(rows[4], rows[5], dim=0)
    chair = torch.nn.functional.cosine_similarity(rows[4], rows[6], dim=0)
    assert lamp > 0.4
    assert chair < 0.3
