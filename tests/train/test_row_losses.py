"""Losses by source and reweighted samples in whole runs: rows of different lengths, on other layouts, and resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.writer import StoreWriter
from nexa.config import load
from nexa.model.decoder import Decoder
from nexa.model.init import initialise
from nexa.train.data import TrainingData
from nexa.train.sources import open_sources
from tests.train.test_kills import MODEL, Forked, finish, rows

T = 16
WEIGHTED = ["reweight.strategy=linear_upper", "reweight.temperature=0.2", "reweight.apply=true"]
WARMUP = "reweight.warmup_steps=2"
METRICS = (
    "loss",
    "grad_norm",
    "loss/a",
    "loss/b",
    "reweight/loss",
    "reweight/effective_samples",
    "reweight/max_weight",
)
Train = Callable[..., list[dict]]


@pytest.fixture(scope="module")
def lengths() -> dict[str, np.ndarray]:
    """Of the documents of two stores, which are rows with data.packing=pad."""
    generator = np.random.default_rng(1)
    return {name: generator.integers(3, 30, 40) for name in ("a", "b")}


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, lengths: dict[str, np.ndarray]) -> Iterator[Train]:
    """A function that trains in a folder of its name and gives its metrics."""
    root, generator = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    for name, words in (("a", 128), ("b", 256)):
        (root / name).mkdir()
        writer = StoreWriter(root / name, np.dtype("<u2"), 10**9)
        tokens = generator.integers(0, words, lengths[name].sum()).astype("<u2")
        writer.append("train", tokens, lengths[name])
        writer.finish(load_tokenizer("bytes"), {})
    mixture = f"data.source=[{{path:{root}/a,weight:3}},{{path:{root}/b,weight:1}}]"
    server = Forked()

    def run(name: str, *extra: str, processes: int = 1) -> list[dict]:
        own = [mixture, f"run.dir={root / name}", "data.packing=pad", "train.steps=5", "train.micro_batch_size=4"]
        server.start(processes, [*MODEL, *own, *extra], root / f"{name}.log")
        finish(server, root / f"{name}.log")
        return rows(root / name)

    run.root = root  # type: ignore[attr-defined]
    yield run
    server.close()


@pytest.fixture(scope="module")
def weighted(train: Train) -> list[dict]:
    return train("weighted", *WEIGHTED, WARMUP)


def test_losses_of_sources_add_up(train: Train, weighted: list[dict], lengths: dict[str, np.ndarray]) -> None:
    cfg = load(train.root / "weighted")  # type: ignore[attr-defined]
    alone = SimpleNamespace(data_size=1, data_rank=0, device=torch.device("cpu"))
    data = TrainingData(cfg, alone, open_sources(cfg, alone))  # type: ignore[arg-type]
    for step, row in enumerate(weighted):
        scored = {"a": 0, "b": 0}
        for name, document in data.sample_ids(step):
            scored[name] += min(lengths[name][document] - 1, T)
        assert 0 < scored["b"] < scored["a"]
        sums = [scored[name] * row[f"loss/{name}"] for name in scored]
        assert sum(sums) / sum(scored.values()) == pytest.approx(row["loss"], rel=1e-6)
        assert row["loss/a"] != row["loss/b"]


def test_only_logged_it_changes_nothing(train: Train, weighted: list[dict]) -> None:
    """Warm-up is plain training, and so is a run that only logs; the third update is weighted in the other."""
    logged = train("logged", *WEIGHTED, "reweight.apply=false", "train.stop_at=3")
    for row, other in zip(logged[:2], weighted[:2], strict=True):
        assert all(row[name] == other[name] for name in METRICS)
    assert logged[2]["loss"] == weighted[2]["loss"] and logged[2]["grad_norm"] != weighted[2]["grad_norm"]
    for row in logged:
        assert 1 / 12 < row["reweight/max_weight"] < 1 and 1 < row["reweight/effective_samples"] < 12
        assert row["reweight/loss"] > row["loss"]


def test_other_layouts(train: Train, weighted: list[dict]) -> None:
    """Two data-parallel ranks with other micro-batches; two tensor-parallel ranks that share tokens out."""
    data = train("data", *WEIGHTED, WARMUP, "train.micro_batch_size=3", "parallel.zero_stage=2", processes=2)
    tensor = ["train.micro_batch_size=6", "parallel.tensor=2", "parallel.sequence=true"]
    for other in (data, train("tensor", *WEIGHTED, WARMUP, *tensor, processes=2)):
        for row, same in zip(other, weighted, strict=True):
            assert {name: row[name] for name in METRICS} == pytest.approx(
                {name: same[name] for name in METRICS}, rel=1e-5
            )


def test_a_resumed_run_is_the_unbroken_one(train: Train, weighted: list[dict]) -> None:
    train("resumed", *WEIGHTED, WARMUP, "train.stop_at=3")
    resumed = train("resumed", *WEIGHTED, WARMUP)
    assert [[row[name] for name in METRICS] for row in resumed] == [[row[name] for name in METRICS] for row in weighted]


def test_gradient_noise_is_that_of_plain_autograd(train: Train) -> None:
    """Two micro-batches of unequal numbers of scored tokens, in one process and shared out; then resumed."""
    noise = ["log.gradient_noise=1", "log.every=1", "train.micro_batch_size=6"]
    rows = train("noise", *noise, "train.stop_at=2")
    cfg = load(train.root / "noise")  # type: ignore[attr-defined]
    alone = SimpleNamespace(data_size=1, data_rank=0, device=torch.device("cpu"))
    step = TrainingData(cfg, alone, open_sources(cfg, alone)).fetch(0)  # type: ignore[arg-type]
    model = Decoder(cfg.model, cfg.norm)
    initialise(model, cfg.model, cfg.norm, cfg.train.seed)
    gradients, tokens = [], []
    for batch in step.micro_batches:
        parts = torch.autograd.grad(model(**batch), list(model.parameters()))
        gradients.append(torch.cat([part.flatten() for part in parts]).double().numpy())
        tokens.append(float((batch["labels"] >= 0).sum()))
    n, total = np.array(tokens), sum(tokens)
    assert n[0] != n[1]
    # E |u_i|^2 = n_i^2 G2 + n_i V, and of the sum over both, with n = S
    equations = np.array([[(n**2).sum(), total], [total**2, total]])
    sums = [sum((u**2).sum() for u in gradients), (sum(gradients) ** 2).sum()]
    square, variance = np.linalg.solve(equations, sums)
    assert rows[0]["gradient_square"] == pytest.approx(square, rel=1e-4, abs=1e-6 * variance)
    assert rows[0]["gradient_variance"] == pytest.approx(variance, rel=1e-4)

    shared = train("noise_shared", *noise, "train.stop_at=1", "parallel.zero_stage=2", processes=2)
    for key in ("gradient_square", "gradient_variance"):
        assert [row[key] for row in shared] == [pytest.approx(rows[0][key], rel=1e-3)]
    resumed = train("noise", *noise)
    assert resumed[:2] == rows
    weights = 0.9 ** np.arange(len(resumed))[::-1]
    scale = sum(weights * [row["gradient_variance"] for row in resumed])
    scale /= sum(weights * [row["gradient_square"] for row in resumed])
    assert resumed[-1].get("gradient_noise_scale") == (pytest.approx(scale) if scale > 0 else None)
