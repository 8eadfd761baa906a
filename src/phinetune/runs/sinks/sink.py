"""What every sink is: told values by step, and closed. Knows nothing of events or of any tool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """The run that a sink shows. `resumed_after` is the step it goes on from; None for a new run."""

    folder: Path
    settings: Mapping[str, Any]
    resumed_after: int | None = None

    @property
    def run_id(self) -> str:
        return self.folder.name

    @property
    def project(self) -> Path:
        """The project folder; its name groups the runs in other tools."""
        return self.folder.parent.parent


class Sink(Protocol):
    """One tool that shows a run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show finite numbers by name at one step."""

    def close(self, status: str) -> None:
        """The run ended: `succeeded`, `interrupted` or `failed`."""
