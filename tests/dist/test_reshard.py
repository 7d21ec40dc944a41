"""A checkpoint written by any layout and read by any other: moments, next losses, and the same samples."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.writer import StoreWriter
from tests.conftest import run_command
from tests.dist.common import LR, config

Cell = tuple[int, int, int]
"""(ZeRO stage, tensor-parallel ranks, data-parallel ranks)."""
CELLS: list[Cell] = [(0, 1, 1), (1, 2, 2), (2, 1, 4), (3, 2, 2), (3, 1, 3)]
BEFORE, AFTER = 4, 5


def mapping(cell: Cell, store: Path, micro: int) -> dict:
    stage, tensor, data = cell
    return config(
        "mix",
        model={"vocab_size": 261},
        data={"source": str(store), "sequence_length": 12},
        train={"global_batch_size": 12, "micro_batch_size": micro},
        parallel={"zero_stage": stage, "tensor": tensor, "sequence": tensor > 1},
    )


def start(folder: Path, first: list[dict], then: list[dict]) -> list[dict]:
    """The results of all jobs. Those with as many processes share a start, and `then` waits for all of `first`."""
    jobs = first + then
    world = [job["config"]["parallel"]["tensor"] * job["data"] for job in jobs]
    phases = [range(len(jobs))] if len(set(world)) == 1 else [range(len(first)), range(len(first), len(jobs))]
    results: dict[int, dict] = {}
    for phase, processes in itertools.product(phases, sorted(set(world))):
        chosen = [index for index in phase if world[index] == processes]
        if not chosen:
            continue
        (folder / "jobs.json").write_text(json.dumps([jobs[index] for index in chosen]))
        arguments = str(folder / "jobs.json"), str(folder / "results.json")
        done = run_command("tests/dist/reshard_worker.py", *arguments, processes=processes, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        results |= zip(chosen, json.loads((folder / "results.json").read_text()), strict=True)
    return [results[index] for index in range(len(jobs))]


def job(folder: Path, cell: Cell, store: Path, *, steps: int, micro: int, load: Path | None, save: Path | None) -> dict:
    name = f"{cell}-from-{load.parent.name if load else 'start'}".replace(" ", "")
    return {
        "config": mapping(cell, store, micro),
        "data": cell[2],
        "steps": steps,
        "lr": LR,
        "load": str(load) if load else None,
        "save": str(save) if save else None,
        "moments": str(folder / f"{name}.safetensors"),
    }


def check(folder: Path, store: Path, pairs: Iterable[tuple[Cell, Cell]]) -> None:
    """Save under each cell, load under its partners, with another micro-batch; all go on as an unbroken run does that shards nothing."""
    pairs = list(pairs)
    sources = sorted({source for source, _ in pairs})
    roots = {cell: folder / f"saved{index}" for index, cell in enumerate(sources)}
    saving = [job(folder, cell, store, steps=BEFORE, micro=1, load=None, save=roots[cell]) for cell in sources]
    plain = (0, 1, 4) if all(tensor * data == 4 for _, tensor, data in sources) else (0, 1, 1)
    unbroken = job(folder, plain, store, steps=BEFORE + AFTER, micro=3, load=None, save=None)
    unbroken["moments"] += ".unbroken"
    loading = [
        job(folder, target, store, steps=AFTER, micro=3 if target[2] < 3 else 1, load=checkpoint(roots[cell]), save=None)
        for cell, target in pairs
    ]
    results = start(folder, [*saving, unbroken], loading)
    whole, resumed = results[len(saving)], results[len(saving) + 1 :]
    saved = {cell: load_file(one["moments"]) for cell, one in zip(sources, saving, strict=True)}
    for (source, target), one, result in zip(pairs, loading, resumed, strict=True):
        moments = load_file(one["moments"])
        assert moments.keys() == saved[source].keys()
        assert all(torch.equal(moments[name], saved[source][name]) for name in moments), (source, target)
        assert result["losses"] == pytest.approx(whole["losses"][BEFORE:], rel=1e-5), (source, target)
        assert result["norms"] == pytest.approx(whole["norms"][BEFORE:], rel=1e-5), (source, target)
        assert result["samples"] == whole["samples"][BEFORE:], (source, target)


def checkpoint(root: Path) -> Path:
    return root / f"step_{BEFORE:08d}"


def test_a_circle(tmp_path: Path, store: Path) -> None:
    """Each cell of four processes writes once and reads once."""
    four = [cell for cell in CELLS if cell[1] * cell[2] == 4]
    check(tmp_path, store, zip(four, four[1:] + four[:1], strict=True))


@pytest.mark.slow
def test_every_pair(tmp_path: Path, store: Path) -> None:
    check(tmp_path, store, itertools.product(CELLS, CELLS))
