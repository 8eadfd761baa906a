"""The method: low-rank updates of frozen linear layers, their files. Knows nothing of text or training.

The layers and functions of loralib are here under their own names, loaded when they are first used:
`import phinetune.lora as lora` takes the place of `import loralib as lora`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phinetune.lora.loralib import (
        Conv1d,
        Conv2d,
        Conv3d,
        ConvLoRA,
        Embedding,
        Linear,
        LoRALayer,
        MergedLinear,
        lora_state_dict,
        mark_only_lora_as_trainable,
    )

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from phinetune.lora import loralib

    return getattr(loralib, name)
