"""What rules of the second tier share: refreshes, draws, limits, matrix functions; resuming and independence."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nexa.optim import build
from nexa.optim.rules.dct_adamw import cosines
from nexa.optim.rules.subspace import (
    drawer,
    inverse_root,
    like,
    limited,
    orthonormal,
    since_refresh,
    tall,
    top_basis,
)
from tests.optim.rule_reference import matrix

CPU = torch.device("cpu")
REFRESHED = dict(rank=3, refresh_every=6)
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("galore", {**REFRESHED, "stagger": True}),
    ("conda", {"refresh_every": 6, "stagger": True}),
    ("fira", REFRESHED),
    ("apollo", {**REFRESHED, "projection": "svd"}),
    ("apollo", {**REFRESHED, "projection": "random", "granularity": "tensor"}),
    ("snsm", {**REFRESHED, "subset_size": 4}),
    ("dct_adamw", {**REFRESHED, "rotate_subspace": True}),
    ("frugal", {"refresh_every": 6, "selection": "columns"}),
    ("frugal", {"refresh_every": 6, "selection": "randk"}),
    ("frugal", {"refresh_every": 6, "selection": "blocks"}),
    ("frugal", {"refresh_every": 6, "selection": "svd"}),
    ("swan", {}),
    ("adamp", {}),
    ("lamb", {}),
    ("adalomo", {}),
    ("spectra", {"base": "galore", **REFRESHED}),
    ("sgg", {"recluster_every": 6}),
    ("eco", {}),
    ("eco", {"rounding": "stochastic"}),
]
SHAPES = {
    "model.embed_tokens.weight": (11, 5),
    "model.layers.1.mlp.up_proj.weight": (9, 5),
    "model.layers.1.mlp.down_proj.weight": (5, 9),
    "model.layers.2.mlp.up_proj.weight": (9, 5),
    "model.layers.2.input_layernorm.weight": (5,),
    "lm_head.weight": (11, 5),
}


def parameters() -> dict[str, nn.Parameter]:
    """A tensor of every part of a model."""
    return {name: nn.Parameter(torch.tensor(matrix(shape, at))) for at, (name, shape) in enumerate(SHAPES.items())}


def train(optimizer: torch.optim.Optimizer, weights: dict[str, nn.Parameter], updates: range) -> None:
    """Updates by gradients that depend on the name and the update alone."""
    for t in updates:
        for name, weight in weights.items():
            weight.grad = torch.tensor(matrix(SHAPES[name], 100 * t + list(SHAPES).index(name)))
        optimizer.step()


@pytest.mark.parametrize(("method", "hp"), METHODS)
def test_resumed_and_alone_are_the_same(method: str, hp: dict[str, Any]) -> None:
    """A resume in the middle of a period changes no bit, nor do other tensors or the state of torch's generator."""
    hp = dict(lr=0.01, weight_decay=0.1, betas=[0.9, 0.99], eps=1e-8, **hp)
    whole = parameters()
    train(build(method, whole.items(), **hp), whole, range(14))
    halves = parameters()
    first = build(method, halves.items(), **hp)
    train(first, halves, range(9))
    torch.manual_seed(1)
    second = build(method, halves.items(), **hp)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, halves, range(9, 14))
    for name, start in parameters().items():
        alone = {name: start}
        train(build(method, alone.items(), **hp), alone, range(14))
        assert torch.equal(whole[name], halves[name]), f"{name}: resumed"
        assert torch.equal(whole[name], start), f"{name}: alone"


def refreshes(every: int, updates: int, **where: Any) -> list[int]:
    return [t for t in range(updates) if since_refresh(t, every, **where) == 0]


def test_refreshes() -> None:
    assert refreshes(4, 13) == [0, 4, 8, 12]
    assert refreshes(4, 13, ahead=1) == [0, 3, 7, 11], "updates 1, 4, 8, 12 counted from 1"
    assert refreshes(1, 3, ahead=1) == refreshes(1, 3) == [0, 1, 2]
    assert refreshes(4, 9, name="lm_head.weight", stagger=True) == [0, 4, 8], "no layer"
    assert [since_refresh(t, 4, ahead=1) for t in range(8)] == [0, 1, 2, 0, 1, 2, 3, 0]


def test_staggered_layers_share_the_work() -> None:
    """32 layers over 200 updates: no update has two of them, and none waits much longer than its share for the next."""
    busy = sorted(
        t
        for layer in range(32)
        for t in refreshes(200, 400, name=f"model.layers.{layer}.mlp.up_proj.weight", stagger=True)
        if 100 <= t < 300
    )
    assert len(busy) == len(set(busy)) == 32
    assert max(np.diff(busy)) <= 2 * 200 / 32


def test_draws_depend_on_seed_name_and_update() -> None:
    def draw(*key: Any) -> list[float]:
        return torch.rand(4, generator=drawer(*key, CPU)).tolist()

    torch.manual_seed(0)
    first = draw(0, "a", 3)
    torch.manual_seed(1)
    assert draw(0, "a", 3) == first
    assert len({tuple(draw(*key)) for key in ((0, "a", 3), (1, "a", 3), (0, "b", 3), (0, "a", 4))}) == 4
    big = torch.randn(200_000, generator=drawer(0, "a", 0, CPU))
    assert abs(big.mean().item()) < 0.01 and abs(big.std().item() - 1) < 0.01


def test_apollo_draws_a_basis_for_each_period_and_matrix() -> None:
    weights = parameters()
    optimizer = build("apollo", weights.items(), lr=0.01, rank=3, refresh_every=2)
    names = [name for name in SHAPES if "up_proj" in name]
    seen = []
    for t in range(4):
        train(optimizer, weights, range(t, t + 1))
        seen.append([optimizer.state[weights[name]]["basis"].clone() for name in names])
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[2][1], seen[3][1])
    assert not torch.equal(seen[1][0], seen[2][0]) and not torch.equal(seen[0][0], seen[0][1])


def test_limit() -> None:
    before, update = torch.zeros(()), torch.tensor([3.0, 4.0])
    assert torch.equal(limited(update, before), update) and before == 5.0, "nothing to compare with"
    assert limited(2 * update, before).norm().item() == pytest.approx(5 * 1.01)
    assert before.item() == pytest.approx(5 * 1.01)
    assert limited(update / 5, before).norm().item() == pytest.approx(1.0), "may shrink at once"
    assert limited(torch.zeros(2), before).norm() == 0.0
    assert torch.isfinite(limited(update, torch.zeros(()))).all()


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_tall(shape: tuple[int, int]) -> None:
    x = torch.tensor(matrix(shape, 0))
    assert tall(x).shape == (max(shape), min(shape)) and torch.equal(like(tall(x), x), x)
    basis = top_basis(x, 2)
    u, s, v = np.linalg.svd(x.double().numpy())
    best = (u[:, :2] * s[:2]) @ v[:2]  # Eckart and Young
    np.testing.assert_allclose(like(tall(x) @ basis @ basis.T, x).numpy(), best, atol=1e-5)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_orthonormal_from_a_wide_spectrum(shape: tuple[int, int]) -> None:
    """Singular values over three decades become 1; those that are 0 stay near it."""
    u, _, v = np.linalg.svd(matrix(shape, 0), full_matrices=False)
    values = np.append(np.logspace(0, -2.5, 22), [0.0, 0.0])
    x = torch.tensor((u * values) @ v * 7.0, dtype=torch.float32)
    np.testing.assert_allclose(orthonormal(x, 12).numpy(), u[:, :22] @ v[:22], atol=2e-3)
    assert not orthonormal(torch.zeros(4, 3), 12).any()


def test_inverse_root() -> None:
    u = np.linalg.qr(matrix((20, 20), 0).astype(np.float64))[0]
    values = np.linspace(1, 30, 20)
    found = inverse_root(torch.tensor((u * values) @ u.T, dtype=torch.float32), 10)
    np.testing.assert_allclose(found.numpy(), (u * values**-0.5) @ u.T, atol=2e-5)


def test_cosine_basis_of_a_large_width_is_orthonormal() -> None:
    """Angles of thousands of turns keep their digits."""
    basis = cosines(3000, torch.tensor([0, 1, 2, 1500, 2998, 2999], dtype=torch.int32)).double()
    torch.testing.assert_close(basis.T @ basis, torch.eye(6).double(), rtol=0, atol=2e-5)
