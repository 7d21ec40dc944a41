"""Norms of very many elements."""

from __future__ import annotations

import pytest
import torch

from nexa.numerics import ROW, euclidean_norm, total_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1, ROW, ROW + 1, 3 * ROW, 60 * ROW + 17])
def test_a_long_sum_keeps_its_digits(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype) * 1e-3 + 1e-4
    found = euclidean_norm(x)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), x.double().square().sum().sqrt(), rtol=1e-6, atol=0)


def test_of_what_does_not_lie_in_one_piece() -> None:
    x = torch.randn(300, 701, generator=torch.Generator().manual_seed(0)).T
    torch.testing.assert_close(euclidean_norm(x).double(), x.double().norm(), rtol=1e-6, atol=0)


def test_total() -> None:
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(shape, generator=generator) for shape in ((5,), (2 * ROW + 3,), (), (400, 300))]
    expected = torch.cat([part.reshape(-1).double() for part in parts]).norm()
    torch.testing.assert_close(total_norm(iter(parts)).double(), expected, rtol=1e-6, atol=0)
    assert total_norm([]) == 0
