"""Count what training, evaluation and answering hold in memory, and measure what a process really held.

Two kinds of figures meet here. Tensors are counted: what waits for the backward pass is measured once on
a few tokens, through autograd's own hooks, and grows with the tokens. Around them stands the process:
interpreter, libraries, weights, what the matrix library prepares for each shape, and free memory the
allocator has not given back. Knows nothing of data or settings.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phinetune.kernels.products import has_tiles
from phinetune.models.attention import PLAIN_MATH_DTYPES
from phinetune.models.attention_stacks import STACKED_PAIRS
from phinetune.models.attention_tiles import JOINED_TOKENS, TILE_ROWS
from phinetune.models.loading import Base
from phinetune.models.loss import BLOCK_ENTRIES, ROWS_MULTIPLE, chunk_rows
from phinetune.models.shared_prefixes import shared_prefixes
from phinetune.text.render import Rendered

# On a CPU in bfloat16 oneDNN prepares code for every shape of a matrix product and keeps it, up to the
# limit that `models.device` sets: about this much more than what a first short pass has prepared.
PREPARED_BYTES = 70e6
# Freed tensors leave holes that tensors of other sizes do not fill: this share of them, at most so much.
HOLES_SHARE, HOLES_BYTES = 0.25, 250e6


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """A piece of work that goes through the model at once.

    `longest_segment` is the longest example in it, or what follows the `longest_prefix` that examples share.
    """

    num_tokens: int
    num_trained_tokens: int
    longest_segment: int
    longest_prefix: int = 0

    @classmethod
    def of(cls, examples: Sequence[Rendered]) -> StepShape:
        """The shape of a batch in which shared leading tokens are computed once."""
        shared = shared_prefixes(examples)
        prefix_tokens = {member: prefix.num_tokens for prefix in shared for member in prefix.members}
        lengths = [example.num_tokens - prefix_tokens.get(i, 0) for i, example in enumerate(examples)]
        return cls(
            num_tokens=sum(lengths) + sum(prefix.num_tokens for prefix in shared),
            num_trained_tokens=sum(example.num_trained for example in examples),
            longest_segment=max([*lengths, *prefix_tokens.values()]),
            longest_prefix=max(prefix_tokens.values(), default=0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a base with its adapter holds, in bytes; `saved_per_token` waits for the backward pass."""

    saved_per_token: float
    num_layers: int
    hidden_size: int
    inner_size: int
    vocab_size: int
    item_bytes: int
    attention_per_pair: float
    num_tile_threads: int
    num_adapter_parameters: int
    num_moments: int
    tokens_multiple: int
    is_cpu: bool
    has_prepared_shapes: bool

    @classmethod
    def of(
        cls, base: Base, saved_per_token: float, *, num_adapter_parameters: int, num_moments: int
    ) -> Costs:
        """`saved_per_token` is measured by `saved_bytes` without gradient checkpointing; the optimizer
        keeps `num_moments` numbers of each weight."""
        config = base.model.config.get_text_config(decoder=True)
        hidden = int(config.hidden_size)
        is_cpu = base.device.type == "cpu"
        item_bytes = base.dtype.itemsize
        # Where attention is plain products, the backward pass holds the probabilities and two gradients of
        # them, and the slope of a soft cap.
        has_cap = bool(getattr(config, "attn_logit_softcapping", None))
        has_own = has_tiles(base.dtype, base.device)  # attention that holds next to nothing
        is_plain = not has_own and (has_cap or (is_cpu and base.dtype in PLAIN_MATH_DTYPES))
        return cls(
            saved_per_token=saved_per_token,
            num_layers=int(config.num_hidden_layers),
            hidden_size=hidden,
            inner_size=int(getattr(config, "intermediate_size", None) or 4 * hidden),
            vocab_size=base.vocab_size,
            item_bytes=item_bytes,
            attention_per_pair=(3 + has_cap) * is_plain * int(config.num_attention_heads) * item_bytes,
            num_tile_threads=torch.get_num_threads() if has_own else 0,
            num_adapter_parameters=num_adapter_parameters,
            num_moments=num_moments,
            tokens_multiple=base.tokens_multiple,
            is_cpu=is_cpu,
            has_prepared_shapes=is_cpu and base.dtype == torch.bfloat16,
        )

    def kept(self) -> float:
        """Held through the whole training beside the weights: gradient, moments, the best weights."""
        num_copies = 1 + self.num_moments + self.is_cpu  # the best weights wait on the CPU
        return 4.0 * num_copies * self.num_adapter_parameters

    def step(self, shape: StepShape, *, is_checkpointed: bool) -> float:
        """Activations and working memory of one forward and backward pass."""
        tokens = self.filled(shape.num_tokens)
        saved = tokens * self.saved_per_token
        layer = saved / self.num_layers
        keys = shape.longest_prefix + max(shape.longest_segment, JOINED_TOKENS)
        pairs = max(min(keys, TILE_ROWS) * keys, min(shape.num_tokens * keys, STACKED_PAIRS))
        # In tiles each thread holds half the gradients of one head's scores, in two bytes each.
        attention = max(pairs * self.attention_per_pair, keys**2 * self.num_tile_threads)
        products = tokens * (2 * self.inner_size + 4 * self.hidden_size) * self.item_bytes
        working = max(products, attention)
        loss = self._loss(shape)
        if not is_checkpointed:
            return saved + max(loss, working)
        inputs = tokens * self.hidden_size * self.item_bytes * self.num_layers
        return inputs + max(loss, layer + working)

    def evaluation(self, shape: StepShape) -> float:
        """One forward pass without gradients, and its loss."""
        return max(self._loss(shape), self.forward(shape.num_tokens))

    def forward(self, num_tokens: int) -> float:
        """The working memory of a forward pass that keeps nothing."""
        widest = max(4 * self.inner_size + 3 * self.hidden_size, 8 * self.hidden_size)
        return float(self.filled(num_tokens) * widest * self.item_bytes)

    def saving(self) -> float:
        """Copies made while a checkpoint is written: the optimizer's moments as bytes."""
        return 4.0 * self.num_moments * self.num_adapter_parameters

    def around(self, tensors: float) -> float:
        """What a process holds beyond what it held before and the tensors counted here."""
        if not self.is_cpu:
            return 0.0
        return PREPARED_BYTES * self.has_prepared_shapes + min(HOLES_SHARE * tensors, HOLES_BYTES)

    def filled(self, num_tokens: int) -> int:
        """The tokens that go through the model: a CPU's are filled up to a multiple."""
        return -(-num_tokens // self.tokens_multiple) * self.tokens_multiple

    def _loss(self, shape: StepShape) -> float:
        """One chunk of logits in the base's type; what of it is in float32, with its probabilities."""
        num_rows = -(-shape.num_trained_tokens // ROWS_MULTIPLE) * ROWS_MULTIPLE
        chunk = min(num_rows, chunk_rows(self.vocab_size, is_cpu=self.is_cpu)) * self.vocab_size
        worked_on = min(chunk, max(BLOCK_ENTRIES, self.vocab_size)) if self.is_cpu else chunk
        in_float32 = 8 if self.item_bytes < 4 else 4
        return float(
            chunk * self.item_bytes
            + worked_on * in_float32
            + 2 * shape.num_trained_tokens * self.hidden_size * self.item_bytes
        )


def saved_bytes(base: Base, work: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward pass of `work`, weights not counted."""
    # Of a divided base a process holds parts; a layer's whole weights are given back after its forward pass.
    held = (p.to_local() if hasattr(p, "to_local") else p for p in base.model.parameters())
    weights = {parameter.untyped_storage().data_ptr() for parameter in held}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held on to, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(storage.nbytes() for storage in kept.values())


def held_bytes(device: torch.device) -> int:
    """Memory held now: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return resident_bytes()


def available_bytes(device: torch.device) -> int:
    """Memory that could still be taken without swapping, within the container's limit if there is one."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + unused)
    import psutil

    available = int(psutil.virtual_memory().available)
    limit, used = (_cgroup_bytes(name) for name in ("memory.max", "memory.current"))
    return available if limit is None or used is None else min(available, max(0, limit - used))


def _cgroup_bytes(name: str) -> int | None:
    try:
        text = (Path("/sys/fs/cgroup") / name).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


@functools.cache
def keep_freed() -> None:
    """Let glibc keep what is freed, for the next step to use: giving it back and taking it again costs a
    tenth of a step's time. `release_unused` gives it back."""
    largest = 2**31 - 1
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    # The second alone would have every large tensor mapped by itself; older versions refuse the first.
    if (mallopt := _of_glibc("mallopt")) and mallopt(mmap_threshold, largest):
        mallopt(trim_threshold, largest)


def release_unused() -> None:
    """Give freed memory back to the system; glibc keeps it in many small holes otherwise."""
    if trim := _of_glibc("malloc_trim"):
        trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of its allocator; other C libraries have none."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def peak_bytes(device: torch.device) -> int:
    """The most memory held so far: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_resident_bytes()


def resident_bytes() -> int:
    """The resident size of this process now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The largest resident size this process has had."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
