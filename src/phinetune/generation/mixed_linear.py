"""Linear layers in which every token has the update of its own row's adapter, or none.

    y_TO = x_TI Wᵀ + (mask_TR ∘ (x_TI A_catᵀ)) B_cat

A_cat and B_cat hold the adapters of a step one below the other, the scale folded into B; the mask
lets through the columns of a token's own adapter. Two products serve all adapters, where one after
the other would be two for each; ranks are filled up with zeros, which changes nothing. A long run of
tokens with the same adapter, as a chunk of a prompt is, has two products of its own: for it the mask
would throw nearly all of the work away. Where layers are small, starting a product costs as much as
computing it: there A_cat lies right below W, and one product gives x Wᵀ and x A_catᵀ.
Knows nothing of requests, files, models or how adapters come and go.

# T tokens of a step, I inputs, O outputs, E seats, R greatest rank
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from phinetune.lora.frozen import TiledLinear, frozen_weight, kind_of
from phinetune.lora.frozen import features as features_of
from phinetune.lora.weights import Update

# From this length on a run has products of its own (8 rows of 400 tokens, rank 16: 87 instead of 77 % of the
# base's pace; of 130 tokens: 79 instead of 86, small products being slow to start). Their lengths are filled
# up: a CPU's matrix library prepares code for every new shape.
LONG_RUN = 256
RUN_MULTIPLE = 128
# Up to this size a weight moves to where A fits below it (768 x 12 layers, 8 rows: a step of 39.1 instead of
# 40.7 ms). A product of a larger one takes longer than its start, and is not worth a copy.
WIDENED_BYTES = 16 << 20


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
        # W with A below it, and as much of that as the steps of now use.
        self._wide_XI: Tensor | None = None
        self._used_XI: Tensor | None = None
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
    def can_widen(self) -> bool:
        """Whether the weight is small, and so that rows may stand below it."""
        inner = self.inner
        if type(inner) is not nn.Linear or type(inner.weight) is not nn.Parameter:
            return False
        if getattr(inner, "bias", None) is not None:
            return False
        return inner.weight.is_contiguous() and inner.weight.nbytes <= WIDENED_BYTES

    def widened(self, num_seats: int, rank: int) -> Tensor:
        """Room for A (seats, rank, in) right below the weight, which moves there."""
        weight = self.inner.weight
        assert isinstance(weight, nn.Parameter)
        num_out, num_in = weight.shape
        wide_XI = weight.data.new_empty(num_out + num_seats * rank, num_in)
        wide_XI[:num_out] = weight.data
        weight.data = wide_XI[:num_out]
        self._wide_XI = wide_XI
        return wide_XI[num_out:].view(num_seats, rank, num_in)

    def narrow(self) -> None:
        """The weight by itself again."""
        if self._wide_XI is not None:
            weight = self.inner.weight
            assert isinstance(weight, nn.Parameter)
            weight.data = weight.data.clone()
            self._wide_XI = self._used_XI = self.a_ERI = self.b_ERO = None

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
        if mix.is_merged or mix.is_idle or self.a_ERI is None:
            return self.inner(x)  # type: ignore[no-any-return]
        if self._range != mix.range:
            self._cut_out()
        x_TI = x.view(-1, x.shape[-1])
        # Where all share, slices would be the same tensors again: 48 layers ask in every step.
        is_all = mix.num_shared == len(x_TI)
        if is_all and self._used_XI is not None:
            return self._in_one(x_TI).view(*x.shape[:-1], -1)
        y: Tensor = self.inner(x)
        assert self.b_ERO is not None
        y_TO = y.view(-1, y.shape[-1])
        if mix.num_shared:
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

    def _in_one(self, x_TI: Tensor) -> Tensor:
        assert self._used_XI is not None
        xw_TX = linear(x_TI, self._used_XI)
        num_used = len(self._b_RO)
        y_TO, u_TR = xw_TX[:, : self._b_RO.shape[1]], xw_TX[:, -num_used:]
        mask_TR = self._mix.mask(u_TR)
        return y_TO.addmm_(u_TR if mask_TR is None else u_TR * mask_TR, self._b_RO)

    def _cut_out(self) -> None:
        assert self.a_ERI is not None
        assert self.b_ERO is not None
        mix = self._mix
        self._a_IR = self.a_ERI[mix.first : mix.end].flatten(0, 1).t()
        self._b_RO = self.b_ERO[mix.first : mix.end].flatten(0, 1)
        self._used_XI = None
        # Seats before the first are computed for nothing: never more of them than are used.
        if self._wide_XI is not None and mix.first <= mix.end - mix.first:
            self._used_XI = self._wide_XI[: self._b_RO.shape[1] + mix.end * mix.rank]
        self._range = mix.range
