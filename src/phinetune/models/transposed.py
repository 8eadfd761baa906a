"""Which layers of a model keep their weight as (in, out): GPT-2's `Conv1D`.

Read from the architecture, not from what an adapter says of it: a square weight would fit either way.
Knows nothing of adapters.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from phinetune.base.errors import ModelError


def transposed_layers(folder: Path) -> frozenset[str]:
    """The module paths of such layers; no weight is read. Raises `ModelError` for an unknown architecture."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    # A config can be wrong in any way, and transformers has errors of many types for it.
    except Exception as error:
        raise ModelError(
            "the model's architecture is not known",
            where=str(folder / "config.json"),
            why=(str(error).strip().splitlines() or [type(error).__name__])[0],
            do="check that it is a decoder-only language model in Hugging Face form",
        ) from error
    return frozenset(name for name, module in model.named_modules() if type(module).__name__ == "Conv1D")
