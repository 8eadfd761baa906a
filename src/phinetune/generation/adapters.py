"""The adapters an engine can answer with: loaded, replaced and unloaded while others are in use.

A row leases the adapter it is admitted with and keeps it to its end, whatever becomes of the name.
Leased adapters have a seat in the mixed layers; an idle one gives its seat up when another needs it,
and its weights too when more than `Limits.max_resident` are in memory and it can be read from disk again.
Not for several threads: the engine holds its lock around every call.

Knows nothing of requests or of how a batch is computed.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from phinetune.base.errors import AdapterError, nearest
from phinetune.generation.mixing import MixedLayers
from phinetune.generation.scheduler import Limits
from phinetune.lora.files import check_base
from phinetune.lora.forms import read_adapter
from phinetune.lora.weights import AdapterWeights


@dataclass(slots=True, kw_only=True, eq=False)
class Loaded:
    """One version of an adapter. `version` is different for every load, of whatever name."""

    name: str
    version: int
    source: Path | None
    weights: AdapterWeights | None
    num_leases: int = 0
    seat: int = 0


class AdapterRegistry:
    """Adapters by name. `limits` say how many answer in one step and stay in memory."""

    def __init__(self, layers: MixedLayers, *, base_sha256: str, limits: Limits) -> None:
        self._layers, self._base_sha256 = layers, base_sha256
        self._max_seats, self._max_resident = limits.max_seats, limits.max_resident
        self._merged_bytes = limits.merged_bytes
        self._by_name: OrderedDict[str, Loaded] = OrderedDict()  # least lately used first
        self._seated: dict[int, Loaded] = {}
        self._versions = itertools.count(1)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    @property
    def names(self) -> list[str]:
        return sorted(self._by_name)

    @property
    def num_resident(self) -> int:
        """Adapters whose weights are in memory, replaced ones that are still in use among them."""
        known = {id(loaded): loaded for loaded in (*self._by_name.values(), *self._seated.values())}
        return sum(loaded.weights is not None for loaded in known.values())

    def load(self, name: str, adapter: Path | AdapterWeights) -> int:
        """Add an adapter, or replace the one of that name for requests to come; returns its version.

        Raises `AdapterError`, and then nothing has changed, when it cannot be read or does not fit the base.
        """
        source = adapter if isinstance(adapter, Path) else None
        weights = self._checked(name, read_adapter(adapter) if isinstance(adapter, Path) else adapter)
        if name in self._by_name:
            self.unload(name)
        loaded = Loaded(name=name, version=next(self._versions), source=source, weights=weights)
        self._by_name[name] = loaded
        self._layers.separate()
        self._forget_beyond_limit()
        return loaded.version

    def unload(self, name: str) -> None:
        """Take an adapter away from requests to come; rows that lease it go on with it to their end."""
        loaded = self.find(name)
        del self._by_name[name]
        if not loaded.num_leases:
            self._leave(loaded)

    def find(self, name: str) -> Loaded:
        """Raises `AdapterError` with the nearest name when there is none of this one."""
        if name not in self._by_name:
            near = nearest(name, list(self._by_name))
            raise AdapterError(
                f"there is no adapter '{name}'",
                where="adapter",
                why=f"loaded are {', '.join(self.names) or 'none'}",
                do=f"did you mean '{near}'?" if near else "load it first",
            )
        return self._by_name[name]

    def lease(self, name: str) -> Loaded | None:
        """The adapter on a seat, to be given back with `release`; None while every seat is taken."""
        loaded = self.find(name)
        if not loaded.seat and not self._sit(loaded):
            return None
        loaded.num_leases += 1
        self._by_name.move_to_end(name)
        self._forget_beyond_limit()
        if self._merged_bytes and len(self._by_name) == len(self._seated) == 1:
            self._layers.merge(loaded.seat, self._merged_bytes)
        return loaded

    def release(self, loaded: Loaded) -> None:
        """The end of one lease; the last one of an adapter that was unloaded frees its seat."""
        loaded.num_leases -= 1
        if not loaded.num_leases and self._by_name.get(loaded.name) is not loaded:
            self._leave(loaded)

    def _sit(self, loaded: Loaded) -> bool:
        free = next((seat for seat in range(1, self._max_seats + 1) if seat not in self._seated), 0)
        if not free:
            idle = [other for other in self._by_name.values() if other.seat and not other.num_leases]
            if not idle:
                return False
            free = idle[0].seat
            self._leave(idle[0])
        if loaded.weights is None:
            assert loaded.source is not None
            loaded.weights = self._checked(loaded.name, read_adapter(loaded.source))
        self._layers.place(free, loaded.weights.updates)
        loaded.seat, self._seated[free] = free, loaded
        return True

    def _leave(self, loaded: Loaded) -> None:
        if loaded.seat:
            self._layers.empty(loaded.seat)
            del self._seated[loaded.seat]
            loaded.seat = 0

    def _forget_beyond_limit(self) -> None:
        """Drop the weights of the least lately used that nobody leases and the disk still has."""
        for loaded in list(self._by_name.values()):
            if self.num_resident <= self._max_resident:
                return
            if not loaded.num_leases and loaded.source is not None and loaded.weights is not None:
                self._leave(loaded)
                loaded.weights = None

    def _checked(self, name: str, weights: AdapterWeights) -> AdapterWeights:
        where = f"adapter '{name}'"
        check_base(weights, where=where, base_sha256=self._base_sha256)
        self._layers.check(weights, where)
        return weights
