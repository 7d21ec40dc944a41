"""Norms with running statistics in training mode, against plain loops over numbers in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from nexa.config.schema import ModelConfig, NormConfig
from nexa.model.decoder import Decoder
from nexa.model.init import initialise
from nexa.model.kinds import KINDS, NormBuilder
from nexa.model.layers import ALONE, Features, Tokens
from nexa.model.norms import NormSite
from nexa.model.running import PowerNorm, RunningNorm, UnifiedNorm

EPS, N, WARMUP = 1e-3, 5, 6
RUNNING = ("powernorm", "unifiednorm")
MODEL = ModelConfig(vocab_size=53, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)


def power_step(rows, grads, weight, s, step):
    """One training pass of PowerNorm over `rows` [tokens][n]: output, gradients of input, weight and bias. `s`: its
    statistics, which this changes."""
    n, count = len(weight), len(rows)
    roots = [math.sqrt(sum(v * v for v in row) / n + EPS) for row in rows]
    u = [[v / root for v in row] for row, root in zip(rows, roots, strict=True)]
    out, du = [[0.0] * n for _ in rows], [[0.0] * n for _ in rows]
    dw, db = [0.0] * n, [0.0] * n
    for j in range(n):
        batch = sum(row[j] ** 2 for row in u) / count
        divisor = math.sqrt((batch if step <= WARMUP else s["square"][j]) + EPS)
        if step < WARMUP:
            s["square"][j] = s["square"][j] * (step - 1) / step + batch / step
        s["square"][j] = 0.9 * s["square"][j] + 0.1 * batch
        nu, drift = s["gradient"][j], 0.0
        for t in range(count):
            z, g = u[t][j] / divisor, grads[t][j] * weight[j]
            out[t][j] = weight[j] * z + s["bias"][j]
            dw[j] += grads[t][j] * z
            db[j] += grads[t][j]
            du[t][j] = (g - nu * z) / divisor
            drift += (g - nu * z) * z / count
        s["gradient"][j] = nu + 0.1 * drift
    dx = []
    for row, root, d in zip(rows, roots, du, strict=True):
        along = sum(a * b for a, b in zip(row, d, strict=True))
        dx.append([d[j] / root - row[j] * along / (n * root**3) for j in range(n)])
    return out, dx, dw, db


def unified_step(rows, grads, weight, s, step):
    """The same for UnifiedNorm."""
    n, count = len(weight), len(rows)
    out, dx = [[0.0] * n for _ in rows], [[0.0] * n for _ in rows]
    dw, db = [0.0] * n, [0.0] * n
    for j in range(n):
        batch = sum(row[j] ** 2 for row in rows) / count
        s["squares"][j] = [*s["squares"][j], batch][-4:]
        warm = step <= max(WARMUP, 4)
        used = batch if warm else math.prod(s["squares"][j]) ** 0.25
        ratio = 1.0
        if step > max(WARMUP, 1000):
            ratio = min(max(math.sqrt((used + EPS) / (s["square"][j] + EPS)), 0.2), 5.0)
        s["square"][j] = 0.9 * s["square"][j] + 0.1 * used
        divisor = math.sqrt(used + EPS)
        z = [row[j] / divisor for row in rows]
        g = [grads[t][j] * weight[j] * ratio for t in range(count)]
        along = sum(a * b for a, b in zip(g, z, strict=True)) / count
        s["gradients"][j] = [*s["gradients"][j], along][-4:]
        mean = along if warm else sum(s["gradients"][j]) / 4
        s["gradient"][j] = 0.9 * s["gradient"][j] + 0.1 * mean
        for t in range(count):
            out[t][j] = weight[j] * z[t] + s["bias"][j]
            dw[j] += grads[t][j] * ratio * z[t]
            db[j] += grads[t][j]
            dx[t][j] = (g[t] - s["gradient"][j] * z[t]) / divisor
    return out, dx, dw, db


STEPS = {PowerNorm: power_step, UnifiedNorm: unified_step}


def norm_of(kind: type[RunningNorm], tokens: Tokens = ALONE) -> RunningNorm:
    torch.manual_seed(0)
    norm = kind(Features.whole(N, tokens), EPS, WARMUP).double()
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * torch.randn(N))
        norm.bias.copy_(0.3 * torch.randn(N))
    return norm


@pytest.mark.parametrize("first", [1, 999], ids=["from the start", "where the ratio begins"])
@pytest.mark.parametrize("kind", STEPS)
def test_every_pass_equals_plain_loops(kind: type[RunningNorm], first: int) -> None:
    """14 passes over batches of changing size: outputs, gradients and every statistic."""
    norm = norm_of(kind)
    norm.updates.fill_(first - 1)
    s = {"square": [1.0] * N, "gradient": [0.0] * N, "bias": norm.bias.tolist()}
    s |= {"squares": [[0.0] * 4 for _ in range(N)], "gradients": [[0.0] * 4 for _ in range(N)]}
    if first > WARMUP:  # what a run of so many passes would have: a window without zeros
        windows = torch.rand(4, N, dtype=torch.float64) + 0.5
        s["squares"] = windows.T.tolist()
        if isinstance(norm, UnifiedNorm):
            norm.recent_squares.copy_(windows)
    for step in range(first, first + 14):
        scale = 1 + 3000 * (step % 9 == 4)  # a jump, so that the ratio meets both its bounds
        x = (scale * torch.randn(2, 3 + step % 3, N, dtype=torch.float64)).requires_grad_()
        gradient = torch.randn_like(x)
        norm.zero_grad()
        y = norm(x)
        y.backward(gradient)
        flat = (x.detach().flatten(0, 1).tolist(), gradient.flatten(0, 1).tolist(), norm.weight.tolist())
        out, dx, dw, db = STEPS[kind](*flat, s, step)
        found = (y.flatten(0, 1), x.grad.flatten(0, 1), norm.weight.grad, norm.bias.grad)
        for one, expected in zip(found, (out, dx, dw, db), strict=True):
            torch.testing.assert_close(one, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-11)
        statistics = {"running_square": s["square"], "running_gradient": s["gradient"]}
        if isinstance(norm, UnifiedNorm):
            statistics |= {"recent_squares": s["squares"], "recent_gradients": s["gradients"]}
        for name, values in statistics.items():
            wanted = torch.tensor(values, dtype=torch.float64)
            wanted = wanted.T if wanted.dim() == 2 else wanted
            torch.testing.assert_close(norm.get_buffer(name), wanted, rtol=1e-9, atol=1e-11)
        assert norm.updates.item() == step


@pytest.mark.parametrize("kind", STEPS)
def test_warm_up_counts_steps_and_gradients_are_those_of_the_whole_batch(kind: type[RunningNorm]) -> None:
    """Two passes a step double the passes of the warm-up; gradients twice as large leave the same statistics."""
    scaled, plain = norm_of(kind, Tokens(gradient_scale=2.0)), norm_of(kind)
    assert norm_of(kind, Tokens(passes_per_step=2)).warmup == 2 * plain.warmup
    for _ in range(WARMUP + 3):
        x, gradient = torch.randn(4, N, dtype=torch.float64), torch.randn(4, N, dtype=torch.float64)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        scaled(a).backward(2 * gradient)
        plain(b).backward(gradient)
        torch.testing.assert_close(a.grad, 2 * b.grad, rtol=1e-12, atol=1e-14)
    for (name, one), other in zip(scaled.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14, msg=name)
    assert plain.running_gradient.abs().min() > 0


def model_of(kind: str, warmup: int) -> Decoder:
    config = NormConfig(kind=kind, placement="peri", warmup_steps=warmup)  # type: ignore[arg-type]
    model = Decoder(MODEL, config)
    initialise(model, MODEL, config, 0)
    ids = torch.randint(0, 53, (4, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(6):
        model(ids[:, :-1], ids[:, 1:]).backward()
    return model


def difference(model: Decoder) -> float:
    """How far the logits of the first 5 of 8 tokens move when the sixth is another one."""
    ids = torch.randint(0, 53, (1, 8), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[0, 5] = (ids[0, 5] + 1) % 53
    with torch.no_grad():
        a, b = copy.deepcopy(model)(ids), copy.deepcopy(model)(other)
    assert not torch.equal(a[:, 5:], b[:, 5:])
    return float((a[:, :5] - b[:, :5]).abs().max())


@pytest.mark.parametrize("kind", RUNNING)
def test_evaluation_sees_no_later_token(kind: str) -> None:
    for warmup in (3, 100):
        assert difference(model_of(kind, warmup).eval()) == 0


def test_where_training_sees_later_tokens() -> None:
    """In warm-up both kinds; afterwards UnifiedNorm, whose window includes the batch."""
    assert difference(model_of("powernorm", 100)) > 1e-4
    assert difference(model_of("powernorm", 3)) == 0
    assert difference(model_of("unifiednorm", 100)) > 1e-4
    assert difference(model_of("unifiednorm", 3)) > 1e-4


@pytest.mark.parametrize("kind", RUNNING)
def test_evaluation_changes_no_statistic_and_has_ordinary_gradients(kind: str) -> None:
    model = model_of(kind, 3).double().eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    ids = torch.randint(0, 53, (2, 7), generator=torch.Generator().manual_seed(2))
    model(ids, ids).backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    norm = model.model.norm
    x = torch.randn(2, 3, MODEL.hidden_size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))
    model.train()(ids)
    assert not any(
        torch.equal(buffer, before[name])
        for name, buffer in norm.named_buffers(prefix="model.norm")
        if "gradient" not in name
    )


@pytest.mark.parametrize("kind", RUNNING)
def test_half_precision_trains_with_fp32_statistics(kind: str) -> None:
    """bf16 weights and activations: the statistics are those of the same numbers in float64 to fp32's precision."""
    made = [
        NormBuilder(KINDS[kind], 1e-6, 64, 4, warmup_steps=2)("final").to(d) for d in (torch.bfloat16, torch.float64)
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        x = torch.randn(2, 8, 64, generator=generator).bfloat16()
        gradient = torch.randn(2, 8, 64, generator=generator).bfloat16()
        for norm in made:
            y = norm(x.to(norm.weight.dtype).requires_grad_())
            assert y.dtype == norm.weight.dtype
            y.backward(gradient.to(y.dtype))
    half, wide = (norm.running_square for norm in made)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), wide, rtol=1e-6, atol=0)


def test_default_warm_up() -> None:
    site = NormSite(Features.whole(4), 1e-6, 4, "final")
    assert (PowerNorm.at(site).warmup, UnifiedNorm.at(site).warmup) == (10_000, 4_000)
