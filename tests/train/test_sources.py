"""From configured mixtures, stages and replays to the rows that each rank reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.writer import StoreWriter
from nexa.config import from_mapping, load, to_yaml
from nexa.config.schema import Config
from nexa.errors import UserError
from nexa.train.data import TrainingData, open_validation
from nexa.train.sources import Sources, data_identity, differing, open_sources
from tests.train.test_run import rows, train

T, BATCH = 4, 12
SIZES = {"a": 81, "b": 41, "c": 13, "old": 121, "older": 29}
FIRST = {name: 1000 * number for number, name in enumerate(SIZES)}
"""The first token of each store; the others count on from it, so that a row tells where it is from."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of stores, and of two runs: `run` on old and, later, older; `second` on c with half of it a replay of
    the first."""
    root = tmp_path_factory.mktemp("stores")
    for name, size in SIZES.items():
        (root / name).mkdir()
        writer = StoreWriter(root / name, np.dtype("<u2"), 10**9)
        tokens = np.arange(FIRST[name], FIRST[name] + size).astype("<u2")
        writer.append("train", tokens, np.array([size]))
        if name in {"a", "old"}:
            writer.append("validation", tokens[:9], np.array([9]))
        writer.finish(load_tokenizer("bytes"), {})
    later = [{"at_tokens": 50, "source": [{"path": f"{root}/older"}, {"path": f"{root}/old"}]}]
    save(root / "run", source=f"{root}/old", stages=later, seed=5)
    save(root / "streamed", source="hf:x/y", tokenizer="bytes")
    save(root / "second", source=f"{root}/c", replay=0.5, replay_from=f"{root}/run", seed=6)
    return root


def save(run: Path, **data: Any) -> None:
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(configuration(run, batch=10, **data)))


def configuration(run: Path, batch: int = BATCH, micro: int = 1, steps: int = 20, seed: int = 0, **data: Any) -> Config:
    train = {"steps": steps, "global_batch_size": batch, "micro_batch_size": micro, "seed": seed}
    return from_mapping({"data": {"sequence_length": T, **data}, "train": train, "run": {"dir": str(run)}})


def ranks(count: int, number: int = 0) -> Any:
    return SimpleNamespace(data_size=count, data_rank=number, device=torch.device("cpu"))


def opened(cfg: Config) -> Sources:
    return open_sources(cfg, ranks(1))


def everything(root: Path, **more: Any) -> dict[str, Any]:
    """Three sources, one of them in its own order, one only later, and a replay of a run with stages."""
    in_order = {"path": f"{root}/b", "replay": True}
    return {
        "source": [{"path": f"{root}/a", "weight": 3}, in_order],
        "stages": [
            {"at_tokens": 150, "source": [{"path": f"{root}/c", "weight": 0.3}, {"path": f"{root}/a", "weight": 0.7}]},
            {"at_tokens": 500, "source": [in_order]},
        ],
        "replay_from": f"{root}/run",
        "replay": 0.25,
        **more,
    }


def global_batch(data: list[TrainingData], step: int) -> list[int]:
    """First token of each row, dealt back from the ranks' micro-batches."""
    parts = [each.fetch(step).micro_batches for each in data]
    return [row for micro in zip(*parts, strict=True) for part in micro for row in part["input_ids"][:, 0].tolist()]


def first_tokens(ids: list[tuple[str, int]]) -> list[int]:
    return [FIRST[name.removeprefix("replay_")] + T * sample for name, sample in ids]


LAYOUTS = [(1, 1), (1, 12), (2, 3), (3, 2), (4, 3), (12, 1), (6, 2)]
"""(data-parallel ranks, micro-batch) of a batch of 12."""


@given(st.integers(0, 2**40), st.lists(st.tuples(st.sampled_from(LAYOUTS), st.integers(1, 9)), min_size=1, max_size=4))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_layouts_and_kills_change_nothing(stores: Path, seed: int, lives: list[tuple[tuple[int, int], int]]) -> None:
    """Each life goes on from what the last one saved; the rows are those of a run that nothing happened to."""
    cfg = configuration(stores / "new", seed=seed, **everything(stores))
    unbroken = TrainingData(cfg, ranks(1), opened(cfg))
    step, passed = 0, []
    for (size, micro), steps in lives:
        cfg = configuration(stores / "new", seed=seed, micro=micro, **everything(stores))
        data = [TrainingData(cfg, ranks(size, rank), opened(cfg)) for rank in range(size)]
        for each in data:
            each.continue_from(step, step * BATCH, passed)
        for number in range(step, step + steps):
            assert global_batch(data, number) == first_tokens(unbroken.sample_ids(number))
        step, passed = step + steps, data[0].stage_starts
        assert data[-1].tokens_by_source(step) == unbroken.tokens_by_source(step)
        assert data[-1].epochs(step) == unbroken.epochs(step)


def test_the_old_order_is_that_of_the_old_run_and_the_new_one_that_of_a_run_without(stores: Path) -> None:
    """36 new samples before the first stage, which begins at sample 48, as in a run without that begins it there."""
    cfg = configuration(stores / "new", **everything(stores))
    plain = everything(stores, replay=None, replay_from=None)
    for stage, samples in zip(plain["stages"], (36, 99), strict=True):
        stage["at_tokens"] = samples * T
    alone = configuration(stores / "new", batch=1, steps=300, **plain)
    old = load(stores / "run")
    mixed, fresh, before = (TrainingData(each, ranks(1), opened(each)) for each in (cfg, alone, old))
    ids = [place for step in range(20) for place in mixed.sample_ids(step)]
    replayed = [(name.removeprefix("replay_"), sample) for name, sample in ids if name.startswith("replay_")]
    assert replayed == [place for step in range(6) for place in before.sample_ids(step)]
    new = [place for place in ids if not place[0].startswith("replay_")]
    assert new == [place for step in range(180) for place in fresh.sample_ids(step)]
    assert mixed.stage_starts == [48, 132] and {name for name, _ in ids[132:] if name[:2] != "re"} == {"b"}
    assert [sum(name.startswith("replay_") for name, _ in mixed.sample_ids(step)) for step in range(20)] == [3] * 20
    assert before.stage_starts == [20], "50 tokens are 13 samples, two batches of the old run's 10"


def test_a_replayed_run_that_replays(stores: Path) -> None:
    cfg = configuration(stores / "new", source=f"{stores}/a", replay=0.5, replay_from=f"{stores}/second")
    sources = opened(cfg)
    data = TrainingData(cfg, ranks(1), sources)
    assert data.tokens_by_source(10) == {
        "a": 60 * T, "replay_c": 30 * T, "replay_replay_old": 25 * T, "replay_replay_older": 5 * T,
    }  # fmt: skip
    assert [path.name for path in sources.every_path] == ["a", "c", "old", "older"]
    identity = data_identity(cfg, sources)
    assert json.loads(json.dumps(identity)) == identity
    assert identity["replay"]["of"]["replay"]["stage_starts"] == [20]


def test_another_batch_size_keeps_the_stages_behind_it(stores: Path) -> None:
    """The first stage began at sample 48; the second, at 132 with batches of 12, is at 130 with those of 7 from 60."""
    data = everything(stores, replay=None, replay_from=None)
    small, large = configuration(stores / "new", batch=7, **data), configuration(stores / "new", **data)
    before, after = (TrainingData(cfg, ranks(1), opened(cfg)) for cfg in (large, small))
    assert before.stage_starts == [48, 132]
    after.continue_from(5, 60, before.stage_starts)
    assert after.stage_starts == [48, 130]
    ids = [place for step in range(5) for place in before.sample_ids(step)]
    ids += [place for step in range(5, 20) for place in after.sample_ids(step)]
    for name, size in (("a", 20), ("b", 10), ("c", 3)):
        mine = [sample for source, sample in ids if source == name]
        whole = len(mine) // size
        assert all(sorted(mine[size * e : size * (e + 1)]) == list(range(size)) for e in range(whole))
        assert len(set(mine[size * whole :])) == len(mine) % size and mine
    b = [sample for source, sample in ids if source == "b"]
    assert b == [number % 10 for number in range(len(b))], "a source with replay: true is in its own order"


def test_weights_by_size(stores: Path) -> None:
    parts = [{"path": f"{stores}/{name}", "weight": None} for name in ("a", "b")]
    for temperature, share in ((1, 81 / 122), (2, 9 / (9 + 41**0.5)), (1e9, 0.5)):
        cfg = configuration(stores / "new", source=parts, temperature=temperature)
        ((a, b),) = opened(cfg).mixtures
        assert a / (a + b) == pytest.approx(share, rel=1e-6)
        (line,) = TrainingData(cfg, ranks(1), opened(cfg)).check()
        assert line.startswith(f"data.source by size^(1/{temperature:g}): a {share:.4f}, b ")


def test_the_lines_at_the_start(stores: Path) -> None:
    cfg = configuration(stores / "new", **everything(stores), steps=10)
    stage, late, replay = TrainingData(cfg, ranks(1), opened(cfg)).check()
    assert stage == "data.stages[0] begins after 192 tokens (asked for: 150): a 0.7000, c 0.3000"
    assert late == "data.stages[1] begins after 528 tokens (asked for: 500), after the end of this run: b 1.0000"
    assert replay.startswith(f"replay: 0.25 of every batch from {stores}/run in its original order, 120 of 480 tokens;")
    assert replay.endswith("360 tokens are new")


def test_a_limit_is_refused_at_the_start_and_not_before_it_is_passed(stores: Path) -> None:
    """b has 10 samples and half of every batch, so the 26th is about sample 51, in step 5."""

    def data(limit: float, steps: int) -> TrainingData:
        parts = [{"path": f"{stores}/b", "max_epochs": limit}, {"path": f"{stores}/a"}]
        cfg = configuration(stores / "new", source=parts, steps=steps)
        return TrainingData(cfg, ranks(1), opened(cfg))

    taken = [name for step in range(6) for name, _ in data(2.5, 6).sample_ids(step)]
    at = [n for n, name in enumerate(taken) if name == "b"][25]
    with pytest.raises(UserError) as caught:
        data(2.5, 6).check()
    assert (
        f"max_epochs=2.5 of {stores}/b: passed after {at * T} tokens, in step 5 of 6; the run would read it 3.60 times"
        in str(caught.value)
    )
    assert "at most 4 steps" in str(caught.value)
    assert data(2.5, 4).check() == [] and data(3.6, 6).check() == []
    later = data(2.5, 6)
    later.continue_from(0, 12)
    with pytest.raises(UserError, match=rf"passed after {at * T} tokens, in step 4 of 6"):
        later.check()


def test_the_identity_tells_orders_apart(stores: Path) -> None:
    def identity(**changes: Any) -> dict[str, Any]:
        cfg = configuration(stores / "new", **{**given, **changes})
        return data_identity(cfg, opened(cfg))

    given = everything(stores)
    changed = everything(stores)
    changed["stages"][0]["source"][0]["weight"] = 0.4
    moved = everything(stores)
    moved["stages"][1]["at_tokens"] = 501
    shuffled = everything(stores)
    limited = everything(stores)
    for part in [shuffled["source"][1], shuffled["stages"][1]["source"][0]]:
        part["replay"] = False
    for part in [limited["source"][1], limited["stages"][1]["source"][0]]:
        part["max_epochs"] = 9
    same = identity()
    assert differing(same, identity(replay=0.3)).startswith("replay: ")
    assert differing(same, identity(replay_from=f"{stores}/second")).startswith("replay: ")
    assert differing(same, identity(**changed)).startswith("stages: ")
    assert differing(same, identity(**moved)).startswith("stages: ")
    assert differing(same, identity(**shuffled)) == "in_file_order: [False, True, False] -> None"
    assert differing(same, identity(**limited)) == "", "a limit changes no order"
    simple = configuration(stores / "new", source=f"{stores}/a")
    assert set(data_identity(simple, opened(simple))) == {"stores", "weights", "seed", "sequence_length"}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"source": [{"path": "a"}, {"path": "./a"}]}, r"data\.source\[1\]\.path=.*a: is in this mixture twice"),
    (
        {"source": [{"path": "a"}], "stages": [{"at_tokens": 9, "source": [{"path": "a", "replay": True}]}]},
        r"data\.stages\[0\]\.source\[0\]\.replay=True: a has False in data\.source\[0\]",
    ),
    ({"source": [{"path": "a", "weight": 1e9}, {"path": "b"}]}, r"data\.source\[1\]\.weight: 1\.0 is less than one"),
    ({"source": "a", "replay": 0.1, "replay_from": "nowhere"}, r"data\.replay_from=.*nowhere: .*no such file"),
    (
        {"source": "a", "replay": 0.1, "replay_from": "streamed"},
        r"data\.replay_from=streamed: it streamed hf:x/y, which",
    ),
    ({"source": "a", "replay": 0.1, "replay_from": "run", "sequence_length": 5}, r"length=4 is not this run's 5"),
]


@pytest.mark.parametrize(("data", "named"), BAD, ids=[named[:30] for _, named in BAD])
def test_what_cannot_be(stores: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any], named: str) -> None:
    monkeypatch.chdir(stores)
    cfg = configuration(stores / "new", **data)
    with pytest.raises(UserError, match=named):
        TrainingData(cfg, ranks(1), opened(cfg))


def test_runs_that_replay_each_other(stores: Path, tmp_path: Path) -> None:
    for one, other in (("x", "y"), ("y", "x")):
        save(tmp_path / one, source=f"{stores}/a", replay=0.1, replay_from=str(tmp_path / other))
    cfg = configuration(tmp_path / "x", source=f"{stores}/a", replay=0.1, replay_from=str(tmp_path / "y"))
    with pytest.raises(UserError, match="replay each other"):
        opened(cfg)


def test_replayed_sources_are_validated(stores: Path) -> None:
    cfg = configuration(stores / "new", **everything(stores))
    assert [data.name for data in open_validation(cfg, ranks(1), opened(cfg))] == ["a", "old"]
    again = replace(cfg, data=replace(cfg.data, source=f"{stores}/old", stages=[]))
    assert [data.name for data in open_validation(again, ranks(1), opened(again))] == ["old"], "once"


def test_a_run_on_replay_and_its_resume(stores: Path, tmp_path: Path) -> None:
    """A run of two stages, then one that replays it: stopped, gone on with another batch, refused another share."""
    common = ["model.vocab_size=8000", f"data.sequence_length={T}", "train.micro_batch_size=1", "eval.batches=1"]
    source = f"data.source={stores}/old"
    stages = f"data.stages=[{{at_tokens: 70, source: [{{path: {stores}/older}}]}}]"
    train(tmp_path, tmp_path / "first", *common, source, stages, "train.steps=4")
    replay = [f"data.source={stores}/a", f"data.replay_from={tmp_path}/first", "eval.every=4"]
    own = [*common, *replay, "train.steps=8"]
    done = train(tmp_path, tmp_path / "next", *own, "data.replay=0.25", "train.stop_at=4")
    assert "64 of 256 tokens; 192 tokens are new" in done.stdout
    train(tmp_path, tmp_path / "next", *own, "data.replay=0.25", "train.global_batch_size=4")
    table = rows(tmp_path / "next")
    counts = [(row["tokens/a"] // T, row["tokens/replay_old"] // T, row["tokens/replay_older"] // T) for row in table]
    assert counts == [(6, 2, 0), (12, 4, 0), (18, 6, 0), (24, 8, 0), (27, 9, 0), (30, 10, 0), (33, 11, 0), (36, 12, 0)]
    assert table[-1]["epochs/a"] == 36 / 20
    assert {"val/a/loss", "val/old/loss"} <= table[-1].keys()
    refused = train(tmp_path, tmp_path / "next", *own, "data.replay=0.5", "train.steps=9", code=2)
    assert "the data order changed since this checkpoint (replay:" in refused.stderr
    state = json.loads((tmp_path / "first" / "checkpoints" / "step_00000004" / "state.json").read_text())
    assert state["stage_starts"] == [24], "70 tokens are 18 samples, three batches of 8"
