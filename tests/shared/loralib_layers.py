"""What the tests of loralib's layers share: weights that are not zero, inputs that fit, one tolerance."""

from __future__ import annotations

import torch


def stirred(layer):
    """Every parameter moved a little, so that neither A nor B is zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return layer


def some_input(name, seed=2):
    generator = torch.Generator().manual_seed(seed)
    if name == "Embedding":
        return torch.randint(0, 11, (3, 5), generator=generator)
    if name.startswith("Conv"):
        return torch.randn(2, 4, *[7] * int(name[4]), generator=generator)
    return torch.randn(3, 5, 12, generator=generator)


def close(one, two):
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
