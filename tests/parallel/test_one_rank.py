"""The engine of one data-parallel rank, against a plain loop with masters and an optimizer of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from nexa.config.build import from_mapping
from nexa.model.decoder import Decoder
from nexa.optim.build import decays
from nexa.parallel.engine import Engine
from nexa.parallel.one_rank import OneRank
from nexa.parallel.topology import Topology, connect, disconnect
from tests.dist.common import CLIP, config

STEPS, LR, DECAY = 6, 3e-3, 0.1


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield connect(from_mapping(config()))
    disconnect()


def batches(count: int) -> list[dict[str, Tensor]]:
    rows = torch.randint(0, 61, (count, 8, 13), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": one[:, :-1], "labels": one[:, 1:].contiguous()} for one in rows]


def plain_loop(model: Decoder, micro: int, keep: list[bool]) -> dict[str, Tensor]:
    """bf16 weights, fp32 masters one by one, gradients of micro-batches summed in fp32, torch's AdamW; the masters."""
    named = dict(model.named_parameters())
    masters = {name: p.detach().float().clone() for name, p in named.items()}
    groups = [
        {"params": [masters[n] for n in named if decays(n) == flag], "weight_decay": DECAY * flag}
        for flag in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-4, foreach=False)
    for batch, update in zip(batches(len(keep)), keep, strict=True):
        sums = {name: torch.zeros_like(master) for name, master in masters.items()}
        for start in range(0, 8, micro):
            part = {key: value[start : start + micro] for key, value in batch.items()}
            count = 8 // micro  # in the engine's order of operations: in bf16 another one is another gradient
            (model(**part) * (count / batch["labels"].numel()) / count).backward()
            for name, parameter in named.items():
                assert parameter.grad is not None
                sums[name] += parameter.grad.float()
                parameter.grad = None
        norm = torch.stack([each.square().sum() for each in sums.values()]).sum().sqrt()
        if not update:
            continue
        for name, master in masters.items():
            master.grad = sums[name] * min(1.0, CLIP / (float(norm) + 1e-6))
        optimizer.step()
        for name, parameter in named.items():
            parameter.data.copy_(masters[name])
    return masters


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("micro", [8, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_a_plain_loop(topology: Topology, precision: str, micro: int, tied: bool) -> None:
    cfg = from_mapping(
        config(
            "peri",
            model={"tie_word_embeddings": tied},
            train={"precision": precision, "micro_batch_size": micro},
            optim={"weight_decay": DECAY},
            parallel={"zero_stage": 2},
        )
    )
    engine, keep = Engine(cfg, topology), [True, True, False, True, True, True]
    assert isinstance(engine._engine, OneRank)
    model = copy.deepcopy(engine.module)
    for parameter in model.parameters():
        parameter._post_accumulate_grad_hooks = None
    expected = plain_loop(model, micro, keep)
    for batch, update in zip(batches(len(keep)), keep, strict=True):
        for start in range(0, 8, micro):
            part = {key: value[start : start + micro] for key, value in batch.items()}
            engine.forward_backward(part, batch["labels"].numel())
        result = engine.step(LR, judge=lambda norm, update=update: torch.tensor(update))
        assert result.skipped is not update and float(result.grad_norm) > 0
    found = {one.name: one.tensors["weight"].view(expected[one.name].shape) for one in engine.fragments()}
    assert found.keys() == expected.keys()
    for name, master in expected.items():
        difference = float((found[name] - master).abs().max())
        # where a last digit decides to which bf16 number a weight is rounded, the next gradient is another one
        assert difference <= (2e-6 if precision == "fp32" else 2e-4), f"{name}: {difference}"
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter.detach(), found[name].to(parameter.dtype)), name
        assert parameter.grad is None, name


class Odd(nn.Module):
    """One matrix that is used twice, one that is used in some steps only."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.rarely = (nn.Linear(3, 3, bias=False, dtype=torch.bfloat16) for _ in range(2))

    def forward(self, x: Tensor, rarely: bool) -> Tensor:
        y = self.twice(self.twice(x))
        return (self.rarely(y) if rarely else y).float().square().sum()


def test_what_no_loss_depends_on_has_gradient_zero() -> None:
    torch.manual_seed(0)
    module = Odd()
    engine = OneRank(module, torch.optim.SGD([{"params": list(module.parameters())}], lr=0.1), accumulation=1)
    x = torch.randn(5, 3, dtype=torch.bfloat16)
    for rarely in (True, False):
        before = [weight.clone() for weight in engine.masters[0].weights]
        grads = torch.autograd.grad(module(x, rarely=rarely), list(module.parameters()), allow_unused=True)
        engine.backward(engine(x=x, rarely=rarely))
        (flat,) = engine.in_few_pieces()
        assert torch.equal(flat, torch.cat([torch.zeros(9) if g is None else g.float().flatten() for g in grads]))
        engine.step()
        for weight, old, gradient in zip(engine.masters[0].weights, before, grads, strict=True):
            torch.testing.assert_close(weight, old if gradient is None else old - 0.1 * gradient.float())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_measuring_changes_nothing(topology: Topology, precision: str) -> None:
    cfg = from_mapping(config(train={"precision": precision, "grad_clip": 1e-2}))
    engines = [Engine(cfg, topology) for _ in range(2)]
    for batch in batches(3):
        for engine, measure in zip(engines, (False, True), strict=True):
            engine.forward_backward(batch, batch["labels"].numel())
            assert float(engine.step(LR, measure=measure).grad_norm) > 1e-2
    for mine, other in zip(*(engine.module.parameters() for engine in engines), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
def test_one_step_is_divided_and_not_the_next(at_once: bool, skipped: bool) -> None:
    torch.manual_seed(0)
    module = nn.Linear(5, 4, bias=False)
    plain = copy.deepcopy(module)
    settings = {"lr": 0.1, "eps": 0.3}  # an eps beside which the size of a gradient matters
    engine = OneRank(module, torch.optim.AdamW(module.parameters(), fused=True, **settings), accumulation=1)
    reference = torch.optim.AdamW(plain.parameters(), foreach=False, **settings)
    for divisor in (4.0, None, 7.0):
        x = torch.randn(3, 5)
        engine.backward(engine.module(x).square().sum())
        plain.zero_grad()
        plain(x).square().sum().backward()
        assert plain.weight.grad is not None
        if divisor is not None:
            engine.divide(torch.tensor(divisor), at_once)
            plain.weight.grad /= divisor
        update = not (skipped and divisor == 4.0)
        engine.step(update)
        if update:
            reference.step()
        torch.testing.assert_close(module.weight, plain.weight, rtol=1e-5, atol=1e-6)
