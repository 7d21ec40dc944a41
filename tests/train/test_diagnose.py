"""Measuring while training: the same numbers in every layout, and training that does not notice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nexa.api import load_model
from nexa.config import from_mapping
from nexa.config.schema import Config
from nexa.diagnostics import DURING_TRAINING, measure
from nexa.errors import UserError
from nexa.train.data import to_tensors
from nexa.train.hooks import build_hooks
from nexa.train.hooks.checkpointing import CheckpointHook
from nexa.train.hooks.diagnosis import DiagnoseHook
from tests.train.test_kills import PATIENCE, Forked
from tests.train.test_run import TINY, losses, rows

OPTIONS = (
    "model.num_hidden_layers=4",
    "norm=lns",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "data.document_mask=true",
    "train.steps=6",
    "checkpoint.every=4",
    "eval.every=0",
    "eval.at_end=false",
    "eval.batches=3",
)
MEGATRON = "parallel.backend=megatron"
MEASURED = (*OPTIONS, "diagnose.every=4", "diagnose.batches=2")


def report(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "reports" / "diagnose.jsonl").read_text().splitlines()]


Train = Callable[..., None]


@pytest.fixture(scope="module")
def train(embedded_cache: Path) -> Iterator[Train]:
    """Starts train.py without a second import of everything; gives what it printed."""
    server = Forked()

    def start(run_dir: Path, *extra: str, processes: int = 1) -> None:
        run_dir.parent.mkdir(exist_ok=True)
        log = run_dir.with_suffix(".log")
        server.start(processes, [*TINY, f"data.cache_dir={embedded_cache}", f"run.dir={run_dir}", *extra], log)
        codes = server.codes(PATIENCE)
        assert codes == [0] * processes, log.read_text()[-3000:]

    yield start
    server.close()


@pytest.fixture(scope="module")
def measured(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "measured"
    train(run_dir, *MEASURED)
    return run_dir


def test_training_does_not_notice(measured: Path, train: Train, tmp_path: Path) -> None:
    train(tmp_path / "plain", *OPTIONS)
    assert not (tmp_path / "plain" / "reports").exists()
    assert losses(measured) == losses(tmp_path / "plain")
    assert [row["grad_norm"] for row in rows(measured)] == [row["grad_norm"] for row in rows(tmp_path / "plain")]


def test_report_and_rows(measured: Path) -> None:
    table = {one["step"]: one for one in report(measured)}
    assert list(table) == [0, 4, 6]
    having = [row for row in rows(measured) if "diagnose/variance/0" in row]
    assert [row["step"] for row in having] == [4, 6]
    for row in having:
        values = table[row["step"]]["values"]
        assert [row[f"diagnose/variance/{name}"] for name in ("embedding", "0", "1", "2", "3")] == values["variance"]
        assert [row[f"diagnose/logit_max/{name}"] for name in ("0", "1", "2", "3")] == values["logit_max"]
        assert row["diagnose/growth_exponent"] == values["growth_exponent"]
    assert table[0]["values"]["variance"] != table[6]["values"]["variance"]


def test_the_checkpoint_measures_the_same(measured: Path, embedded_cache: Path) -> None:
    """The report of the last step, from the checkpoint and the validation split by other means."""
    from data_pipeline.batches import ValidationRows
    from data_pipeline.embedded import embedded_store
    from data_pipeline.store import open_store

    store = open_store(embedded_store(str(embedded_cache), 300), "validation")
    data = to_tensors(ValidationRows(store, 32, document_mask=True).rows(0, 16))
    with torch.no_grad():
        found = measure(load_model(measured), [data], DURING_TRAINING)
    last = report(measured)[-1]
    assert last["tokens"] == found.tokens
    for name, values in found.values.items():
        assert last["values"][name] == pytest.approx(values, rel=1e-5), name


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.tensor=2", "parallel.sequence=true", "parallel.zero_stage=1"),
        ("parallel.zero_stage=3", "train.micro_batch_size=1", "train.precision=fp32"),
        pytest.param(("parallel.tensor=2", "parallel.zero_stage=0"), marks=pytest.mark.slow),
        pytest.param(("parallel.tensor=2", "parallel.sequence=true", MEGATRON), marks=pytest.mark.slow),
        pytest.param(("parallel.zero_stage=2", "train.activation_checkpointing=full"), marks=pytest.mark.slow),
    ],
)
def test_every_layout_measures_the_same(measured: Path, train: Train, tmp_path: Path, layout: tuple[str, ...]) -> None:
    train(tmp_path / "two", *MEASURED, *layout, processes=2)
    for mine, expected in zip(report(tmp_path / "two"), report(measured), strict=True):
        assert mine.keys() == expected.keys() and mine["values"].keys() == expected["values"].keys()
        for name in ("step", "tokens", "sequences", "loss"):
            assert mine[name] == pytest.approx(expected[name], rel=1e-5), name
        for name, values in expected["values"].items():
            assert mine["values"][name] == pytest.approx(values, rel=1e-5), name


@pytest.mark.slow
def test_a_resumed_run_measures_every_step_once(measured: Path, train: Train, tmp_path: Path) -> None:
    run_dir = tmp_path / "resumed"
    train(run_dir, *MEASURED, "train.stop_at=5", "checkpoint.at_end=false")
    assert [one["step"] for one in report(run_dir)] == [0, 4, 5]
    train(run_dir, *MEASURED)
    assert report(run_dir) == report(measured)


def test_without_validation_data() -> None:
    checkpoint = CheckpointHook(Path("x"), {}, {}, {})
    with pytest.raises(UserError, match=r"diagnose\.every=4: there is no validation split to measure"):
        build_hooks(from_mapping({"diagnose": {"every": 4}}), [], checkpoint)
    assert not any(isinstance(hook, DiagnoseHook) for hook in build_hooks(Config(), [], checkpoint))
