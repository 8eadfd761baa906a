"""phinetune: fine-tune small language models with LoRA on your own machine and measure the result."""

__version__ = "0.1.0"

__all__ = ["__version__"]


def __dir__() -> list[str]:
    return sorted(__all__)
