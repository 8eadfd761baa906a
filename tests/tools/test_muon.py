"""Muon's update and the training loss, on small tensors."""

from __future__ import annotations

import torch
from demo_train.muon import Muon, orthogonalised


def test_singular_values_come_close_to_one() -> None:
    torch.manual_seed(0)
    for shape in ((32, 32), (64, 16), (16, 64)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)).float())
        assert values.min() > 0.3
        assert values.max() < 1.4


def test_a_fused_matrix_is_updated_as_its_parts() -> None:
    torch.manual_seed(1)
    gradient = torch.randn(24, 8)
    fused = torch.zeros(24, 8, requires_grad=True)
    parts = [torch.zeros(8, 8, requires_grad=True) for _ in range(3)]
    fused.grad = gradient.clone()
    for part, piece in zip(parts, gradient.chunk(3), strict=True):
        part.grad = piece.clone()
    Muon([(fused, 3)], lr=0.1).step()
    Muon([(part, 1) for part in parts], lr=0.1).step()
    torch.testing.assert_close(fused.detach(), torch.cat([part.detach() for part in parts]))


def test_a_step_goes_against_the_gradient() -> None:
    weight = torch.zeros(4, 4, requires_grad=True)
    weight.grad = torch.eye(4)
    Muon([(weight, 1)], lr=0.01).step()
    assert (weight.detach().diagonal() < 0).all()
