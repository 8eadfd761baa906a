"""Divide a frozen base among processes: each holds its part of every block (PyTorch's FSDP2).

A block's weights are put together for the time it computes, in the forward and in the backward pass.
Embeddings, last norm and output head stay whole: they are small, and the loss reads the head's weight.
Knows nothing of adapters: layers put around a block's linears later are not divided.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from phinetune.base.errors import ModelError


def shard_blocks(model: PreTrainedModel, device: torch.device) -> None:
    """Divide the blocks among all processes that have joined; every one must call this.

    A block goes to `device` as it is divided, so the device never holds the whole model.
    Raises `ModelError` when the model's blocks cannot be found.
    """
    decoder = model.get_decoder()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks_of(decoder, int(model.config.num_hidden_layers)):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # The decoder last, with no weights to divide: it lets the next block's come while one computes.
    whole = {weight for weight in decoder.parameters() if not isinstance(weight, DTensor)}
    fully_shard(decoder, mesh=mesh, ignored_params=whole)


def blocks_of(decoder: nn.Module, number: int) -> nn.ModuleList:
    """The list of a decoder's blocks. Raises `ModelError` when there is none of that length."""
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    raise ModelError(
        "the base cannot be divided among processes",
        where="--shard",
        why=f"no list of {number} blocks was found in {type(decoder).__name__}",
        do="leave --shard out: every process then holds the whole base",
    )
