"""The error tree: what people see when something is wrong.

    PhinetuneError              what happened, where, why, and what to do
    ├── UserError               the input is wrong; exit 2, never a traceback
    │   ├── DataError           rows of a data set; carries every finding
    │   ├── SettingsError       lora.yaml or --set
    │   ├── ModelError          a base model folder or name
    │   ├── AdapterError        an adapter folder
    │   │   └── IncompatibleLowRankAdapter   a sound adapter on the wrong base
    │   └── SpaceError          not enough disk or memory for what was asked
    └── RunError                a run failed through no fault of the input; exit 1
        ├── DivergedError       loss or gradient stopped being finite
        └── LostProcessError    one of the processes of a run has died

Knows nothing of terminals: the command line decides how an error looks.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class PhinetuneError(Exception):
    """Base of all expected failures.

    >>> print(PhinetuneError("no such file", where="train.json", do="check the path"))
    no such file
      where: train.json
      do:    check the path
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", do: str = "") -> None:
        self.what, self.where, self.why, self.do = what, where, why, do
        super().__init__(what)

    def __str__(self) -> str:
        parts = (("where", self.where), ("why", self.why), ("do", self.do))
        lines = [self.what] + [f"  {name + ':':<6} {text}" for name, text in parts if text]
        return "\n".join(lines)


class UserError(PhinetuneError):
    """Something the user can put right."""


class DataError(UserError):
    """Rows that cannot be trained on; `findings` holds one entry per fault, in file order."""

    def __init__(
        self, what: str, *, where: str = "", why: str = "", do: str = "", findings: tuple[object, ...] = ()
    ) -> None:
        super().__init__(what, where=where, why=why, do=do)
        self.findings = findings


class SettingsError(UserError):
    """A setting that is unknown, of the wrong type, or in conflict with another."""


class ModelError(UserError):
    """A base model that cannot be found or loaded."""


class AdapterError(UserError):
    """An adapter that cannot be read."""


class IncompatibleLowRankAdapter(AdapterError):
    """A sound adapter that belongs to another base model."""


class SpaceError(UserError):
    """Not enough disk space or memory."""


class RunError(PhinetuneError):
    """A run that failed while running."""


class DivergedError(RunError):
    """Loss or gradient stopped being finite; the weights before that step are kept."""


class LostProcessError(RunError):
    """Another process of the same run is gone; what was trained up to the step before is kept."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most like `name`, or "" when none is close.

    >>> nearest("learning_rat", ["learning_rate", "epochs"])
    'learning_rate'
    """
    matches = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else ""
