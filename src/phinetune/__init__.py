"""phinetune: fine-tune small language models with LoRA on your own machine and measure the result.

    import phinetune

    for event in phinetune.train("my-project"):
        print(event)
    model = phinetune.load("my-project/runs/20261120-142233-k3f")
    print(model.chat("My parcel is late"))

The functions are loaded on first use: the import itself is quick and needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phinetune.api import evaluate, load, load_classifier, train

__version__ = "0.1.0"

__all__ = ["__version__", "evaluate", "load", "load_classifier", "train"]


def __getattr__(name: str) -> Any:
    if name not in ("evaluate", "load", "load_classifier", "train"):
        raise AttributeError(f"module 'phinetune' has no attribute '{name}'")
    from phinetune import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
