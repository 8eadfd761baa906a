"""loralib's layers and functions, under its names and with its arguments.

A script written for loralib runs after one changed import; state dicts load both ways. Where loralib
0.1.2 is wrong, this is right: docs/lora.md lists the differences.
Knows nothing of language models, adapter folders or training.
"""

from phinetune.lora.loralib.convolution import Conv1d, Conv2d, Conv3d, ConvLoRA
from phinetune.lora.loralib.linear import Embedding, Linear, MergedLinear
from phinetune.lora.loralib.marking import lora_state_dict, mark_only_lora_as_trainable
from phinetune.lora.loralib.merging import LoRALayer

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
