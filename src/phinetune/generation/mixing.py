"""Linear layers in which every token has the update of its own row's adapter, or none.

    y_TO = x_TI Wᵀ + (mask_TR ∘ (x_TI A_catᵀ)) B_cat

A_cat and B_cat hold the adapters of a step one below the other, the scale folded into B; the mask
lets through the columns of a token's own adapter. Two products serve all adapters, where one after
the other would be two for each; ranks are filled up with zeros, which changes nothing. A long run of
tokens with the same adapter, as a chunk of a prompt is, has two products of its own: for it the mask
would throw nearly all of the work away.
Knows nothing of requests, files or how adapters come and go.

# T tokens of a step, I inputs, O outputs, E seats, R greatest rank
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from phinetune.base.errors import AdapterError
from phinetune.lora.attach import linear_layers
from phinetune.lora.files import check_layers
from phinetune.lora.frozen import TiledLinear, frozen_weight, kind_of
from phinetune.lora.frozen import features as features_of
from phinetune.lora.weights import AdapterWeights, Update, require_no_head, require_updates_only

# From this length on a run has products of its own (8 rows of 400 tokens, rank 16: 87 instead of 77 % of the
# base's pace; of 130 tokens: 79 instead of 86, small products being slow to start). Their lengths are filled
# up: a CPU's matrix library prepares code for every new shape.
LONG_RUN = 256
RUN_MULTIPLE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Neighbouring tokens of one seat; up to `filled` others may be read with them, and get nothing."""

    seat: int
    begin: int
    end: int
    filled: int


class Mix:
    """What all mixed layers of a model share: the seats, and which seat each token of the step has.

    Seat 0 is the base: no adapter sits there.
    """

    def __init__(self) -> None:
        self.rank = 0
        self.num_seats = 0
        # The seats in use lie in first..end; None when every token is the base's.
        self.first = self.end = 1
        self.is_idle = True
        # The seat whose adapter the layers hold merged, and whether the step is all its own.
        self.merged_seat = 0
        self.is_merged = False
        # Changes when another part of the seats is used, or the seats themselves have changed.
        self.range: tuple[int, int, int, int] = (1, 1, 0, 0)
        # The tokens that share a product come first, then the long runs.
        self.num_shared = 0
        self.runs: list[Run] = []
        self._seats_T = torch.zeros(0, dtype=torch.long)
        self._is_one_seat = False
        self._mask_TR: Tensor | None = None

    def begin(self, seats: Sequence[int], num_filling: int = 0) -> None:
        """Set the seat of each token of the coming step; tokens that fill it up come last and have none."""
        self.is_merged = bool(self.merged_seat) and set(seats) == {self.merged_seat}
        if self.is_merged:
            return
        self._mask_TR = None
        seats = [*seats, *[0] * num_filling]
        self.num_shared, self.runs = _divided(seats)
        found = set(seats[: self.num_shared])
        used = sorted(found - {0})
        if not used:
            self.num_shared = 0
        self.is_idle = not used and not self.runs
        if used:
            self._seats_T = torch.tensor(seats[: self.num_shared])
            self._is_one_seat = len(found) == 1
            self.first, self.end = used[0], used[-1] + 1
        self.range = (self.first, self.end, self.num_seats, self.rank)

    def mask(self, like: Tensor) -> Tensor | None:
        """(shared T, seats · R) of zeros and ones, the same for every layer; None when all have one seat."""
        if self._is_one_seat:
            return None
        if self._mask_TR is None:
            seats_T = self._seats_T
            seat_E = torch.arange(self.first, self.end)
            mask_TE = (seats_T[:, None] == seat_E).to(device=like.device, dtype=like.dtype)
            self._mask_TR = mask_TE.repeat_interleave(self.rank, dim=1)
        return self._mask_TR


def _divided(seats: Sequence[int]) -> tuple[int, list[Run]]:
    """How many tokens at the beginning share a product, and the runs after them that have an adapter.

    >>> _divided([1, 2] + [3] * 300 + [0] * 2)
    (2, [Run(seat=3, begin=2, end=302, filled=304)])
    """
    position, num_shared = 0, None
    runs = []
    for seat, group in groupby(seats):
        end = position + sum(1 for _ in group)
        if num_shared is None and end - position >= LONG_RUN:
            num_shared = position
        if num_shared is not None and seat:
            filled = min(position + -(-(end - position) // RUN_MULTIPLE) * RUN_MULTIPLE, len(seats))
            runs.append(Run(seat=seat, begin=position, end=end, filled=filled))
        position = end
    return (len(seats) if num_shared is None else num_shared), runs


class MixedLinear(nn.Module):
    """A linear layer with the updates of all seats beside it; without any it is the layer itself."""

    def __init__(self, inner: nn.Module, mix: Mix) -> None:
        super().__init__()
        self.inner, self._mix = inner, mix
        self._dtype, self._device = kind_of(inner)
        self.a_ERI: Tensor | None = None
        self.b_ERO: Tensor | None = None
        # The part of both that the steps of now use, cut out once: 48 layers ask in every step.
        self._range: tuple[int, int, int, int] | None = None
        self._a_IR = self._b_RO = torch.empty(0)
        self._merged_OI: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen weight: model code may ask for its type."""
        weight = self.inner.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias: an attached adapter's layer computes with the parts of what it stands on."""
        bias: Tensor | None = self.inner.bias  # type: ignore[assignment]
        return bias

    def place(self, seat: int, update: Update | None) -> None:
        """Seat an update; None empties the seat."""
        self._range = None
        if update is None:
            if self.a_ERI is not None and self.b_ERO is not None and seat < len(self.a_ERI):
                self.b_ERO[seat] = 0
            return
        assert self.a_ERI is not None
        assert self.b_ERO is not None
        self.a_ERI[seat], self.b_ERO[seat] = 0, 0
        self.a_ERI[seat, : update.rank] = update.a_RI.to(self.a_ERI)
        self.b_ERO[seat, : update.rank] = (update.b_OR.float() * update.scaling).t().to(self.b_ERO)

    @property
    def num_features(self) -> tuple[int, int]:
        """Inputs and outputs."""
        out_features, in_features = features_of(self.inner)
        return in_features, out_features

    @property
    def kind(self) -> tuple[torch.dtype, torch.device]:
        """What it computes in, and where."""
        return self._dtype, self._device

    def move(self, a_ERI: Tensor, b_ERO: Tensor) -> None:
        """Have the seats in these tensors, with who sits there now."""
        for old, new in ((self.a_ERI, a_ERI), (self.b_ERO, b_ERO)):
            new.zero_()
            if old is not None:
                new[: old.shape[0], : old.shape[1]] = old
        self.a_ERI, self.b_ERO, self._range = a_ERI, b_ERO, None

    @property
    def num_bytes(self) -> int:
        """Of the merged weight, if there was one."""
        out_features, in_features = features_of(self.inner)
        return out_features * in_features * self._dtype.itemsize if self.b_ERO is not None else 0

    @property
    def is_quantised(self) -> bool:
        return isinstance(self.inner, TiledLinear)

    def merge(self, seat: int) -> None:
        """Hold the weight with this seat's update added in float32; 0: hold none."""
        self._merged_OI = None
        if seat and self.a_ERI is not None and self.b_ERO is not None:
            weight_OI = frozen_weight(self.inner)
            assert isinstance(weight_OI, Tensor)
            update_OI = self.b_ERO[seat].t().float() @ self.a_ERI[seat].float()
            self._merged_OI = (weight_OI.float() + update_OI).to(self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        mix = self._mix
        if mix.is_merged and self._merged_OI is not None:
            return linear(x, self._merged_OI, self.inner.bias)  # type: ignore[arg-type]
        y: Tensor = self.inner(x)
        if mix.is_merged:
            return y
        if mix.is_idle or self.a_ERI is None:
            return y
        if self._range != mix.range:
            self._cut_out()
        assert self.b_ERO is not None
        x_TI, y_TO = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if mix.num_shared:
            # Where all share, slices would be the same tensors again: 48 layers ask in every step.
            is_all = mix.num_shared == len(x_TI)
            u_TR = (x_TI if is_all else x_TI[: mix.num_shared]) @ self._a_IR
            mask_TR = mix.mask(u_TR)
            if mask_TR is not None:
                u_TR *= mask_TR
            (y_TO if is_all else y_TO[: mix.num_shared]).addmm_(u_TR, self._b_RO)
        for run in mix.runs:
            u_TR = x_TI[run.begin : run.filled] @ self.a_ERI[run.seat].t()
            u_TR[run.end - run.begin :] = 0
            y_TO[run.begin : run.filled].addmm_(u_TR, self.b_ERO[run.seat])
        return y

    def _cut_out(self) -> None:
        assert self.a_ERI is not None
        assert self.b_ERO is not None
        mix = self._mix
        self._a_IR = self.a_ERI[mix.first : mix.end].flatten(0, 1).t()
        self._b_RO = self.b_ERO[mix.first : mix.end].flatten(0, 1)
        self._range = mix.range


class MixedLayers:
    """The mixed layers of one model, put in the places of its linear layers and taken out again."""

    def __init__(self, model: nn.Module) -> None:
        self.mix = Mix()
        self._model = model
        self._layers = {name: MixedLinear(module, self.mix) for name, module in linear_layers(model).items()}
        for name, layer in self._layers.items():
            _put(model, name, layer)

    def remove(self) -> None:
        """The model as it was."""
        for name, layer in self._layers.items():
            _put(self._model, name, layer.inner)

    def check(self, weights: AdapterWeights, where: str) -> None:
        """Raise `AdapterError` for an adapter that cannot be mixed or does not fit the model."""
        require_no_head(weights, where)
        if weights.uses_dora:
            raise AdapterError(
                "an adapter with DoRA cannot share a batch with others",
                where=where,
                why="its magnitudes scale the base's own weights",
                do="merge it into the base: phinetune adapter merge",
            )
        require_updates_only(weights, where)
        check_layers({name: layer.inner for name, layer in self._layers.items()}, weights, where)

    def place(self, seat: int, weights: Mapping[str, Update]) -> None:
        """Seat an adapter's updates; layers it does not have are emptied there."""
        self.separate()
        shape = self.mix.num_seats, self.mix.rank
        self.mix.num_seats = max(self.mix.num_seats, seat + 1)
        self.mix.rank = max([self.mix.rank, *(update.rank for update in weights.values())])
        seated = {name for name, layer in self._layers.items() if layer.a_ERI is not None}
        if shape != (self.mix.num_seats, self.mix.rank) or not weights.keys() <= seated:
            self._move(seated | weights.keys())
        for name, layer in self._layers.items():
            layer.place(seat, weights.get(name))

    def _move(self, names: Set[str]) -> None:
        """Room for the seats and the rank of now, side by side for all layers that have adapters.

        In one piece they are read faster than in 96: a decoding step of eight rows 1 to 2 %.
        """
        layers = [layer for name, layer in self._layers.items() if name in names]
        rows = self.mix.num_seats, self.mix.rank
        sizes = [math.prod(rows) * num for layer in layers for num in layer.num_features]
        dtype, device = layers[0].kind
        room = torch.empty(sum(sizes), dtype=dtype, device=device)
        parts = iter(room.split(sizes))
        for layer in layers:
            a, b = (next(parts).view(*rows, num) for num in layer.num_features)
            layer.move(a, b)

    def merge(self, seat: int, most_bytes: int) -> None:
        """Hold this seat's adapter merged too, if that takes no more than so many bytes.

        Never on a quantised base: its weights would be there in full, and rounded anew they would not be its.
        """
        if any(layer.is_quantised for layer in self._layers.values()):
            return
        is_small = sum(layer.num_bytes for layer in self._layers.values()) <= most_bytes
        if is_small and self.mix.merged_seat != seat:
            for layer in self._layers.values():
                layer.merge(seat)
            self.mix.merged_seat = seat

    def separate(self) -> None:
        """Give merged weights back."""
        if self.mix.merged_seat:
            for layer in self._layers.values():
                layer.merge(0)
            self.mix.merged_seat, self.mix.is_merged = 0, False

    def empty(self, seat: int) -> None:
        """Nobody sits here any more."""
        self.separate()
        for layer in self._layers.values():
            layer.place(seat, None)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent_name, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent_name), child, module)
