from __future__ import annotations

import pytest
import torch

from tools.demo_model.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64), (3, 24, 40)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    result = orthogonal(matrix).float()
    assert result.shape == matrix.shape
    values = torch.linalg.svdvals(result)
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    exact = left @ right
    alike = torch.nn.functional.cosine_similarity(result.flatten(), exact.flatten(), dim=0)
    assert float(alike) > 0.97


def test_scale_of_a_gradient_does_not_matter() -> None:
    matrix = torch.randn(16, 16, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(orthogonal(matrix * 1024), orthogonal(matrix), atol=0.02, rtol=0.05)


def test_a_step_goes_down_and_parameters_of_one_shape_stay_apart() -> None:
    generator = torch.Generator().manual_seed(3)
    wanted = [torch.randn(shape, generator=generator) for shape in ((8, 8), (8, 8), (12, 4), (2, 8, 4))]
    parameters = [torch.nn.Parameter(torch.zeros_like(target)) for target in wanted]
    muon = Muon(parameters)

    def distances() -> list[float]:
        return [float((p - t).detach().norm()) for p, t in zip(parameters, wanted, strict=True)]

    before = distances()
    for step in range(200):
        loss = sum(((p - t) ** 2).sum() for p, t in zip(parameters, wanted, strict=True))
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        muon.step(rate=0.1 * (1 - step / 200), decay=0.0)
        for parameter in parameters:
            parameter.grad = None
    assert all(after < 0.1 * first for after, first in zip(distances(), before, strict=True))


def test_decay_shrinks_what_the_gradient_leaves_alone() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    parameter.grad = torch.zeros(4, 4)
    Muon([parameter]).step(rate=0.5, decay=0.1)
    torch.testing.assert_close(parameter.detach(), torch.full((4, 4), 0.95))
