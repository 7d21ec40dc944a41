"""Grown from a checkpoint of one layout, trained on in another."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nexa.checkpoint.load import load_state_dict, read_manifest, verify
from nexa.growth.grow import grow
from nexa.growth.operators import Growth
from tests.dist.test_reshard import BEFORE, CELLS, Cell, checkpoint, job, start


def everything(path: Path) -> dict[str, torch.Tensor]:
    """Weights by name, optimizer state as `<state>/<parameter>`."""
    found = load_state_dict(path)
    for file in path.glob("optimizer-*.safetensors"):
        found |= load_file(file)
    return found


def deeper(one: dict, load: Path) -> dict:
    one["config"]["model"]["num_hidden_layers"] = 8
    return one | {"load": str(load)}


def check(folder: Path, store: Path, source: Cell, targets: list[Cell]) -> None:
    """Each block is that of j mod 4; every layout that loads it holds just that, and takes the same steps from it."""
    saved = folder / "saved"
    (run,) = start(folder, [job(folder, source, store, steps=BEFORE, micro=1, load=None, save=saved)], [])
    assert len(run["losses"]) == BEFORE
    done = grow(checkpoint(saved), folder / "grown", Growth("stack", factor=2, moments="copy"))
    verify(done.path)
    small, large = everything(checkpoint(saved)), everything(done.path)
    copied = 0
    for key, tensor in large.items():
        before, _, rest = key.partition("model.layers.")
        index, _, rest = rest.partition(".")
        old = f"{before}model.layers.{int(index) % 4}.{rest}" if rest else key
        if old in small:  # block 1 becomes Post-LN: its norms are new
            assert torch.equal(tensor, small[old]), key
            copied += 1
    assert len(large) - copied == 3 * (2 + 2) and {key.split("/")[0] for key in large} >= {"exp_avg", "exp_avg_sq"}
    fresh = grow(checkpoint(saved), folder / "fresh", Growth("stack", factor=2))
    jobs = []
    for number, (cell, grown) in enumerate([*((cell, done.path) for cell in targets), (targets[0], fresh.path)]):
        again = job(folder, cell, store, steps=0, micro=1, load=None, save=folder / f"again{number}")
        further = job(folder, cell, store, steps=2, micro=1, load=None, save=None)
        jobs += [deeper(one, grown) | {"moments": str(folder / f"{len(jobs)}.safetensors")} for one in (again, further)]
    results = start(folder, jobs, [])
    for number, cell in enumerate(targets):
        found = everything(checkpoint(folder / f"again{number}"))
        assert found.keys() == large.keys()
        assert all(torch.equal(found[key], large[key]) for key in large), cell
    *losses, anew = [result["losses"] for result in results[1::2]]
    assert all(len(one) == 2 and one == pytest.approx(losses[0], rel=1e-5) for one in losses)
    # without moments the same model takes another step
    assert anew[0] == losses[0][0] and anew[1] != pytest.approx(losses[0][1], rel=1e-5)
    found = everything(checkpoint(folder / f"again{len(targets)}"))
    assert all(not tensor.any() for key, tensor in found.items() if key.startswith("exp_avg"))
    samples = [result["samples"] for result in results[1::2]]
    read = {tuple(one) for step in run["samples"] for one in step}
    assert all(one == samples[0] for one in samples) and not {tuple(one) for one in samples[0][0]} & read
    assert read_manifest(done.path)["origin"]["step"] == BEFORE


def test_another_layout(tmp_path: Path, store: Path) -> None:
    check(tmp_path, store, (3, 1, 2), [(1, 2, 1), (2, 1, 2)])


@pytest.mark.slow
@pytest.mark.parametrize("source", [*CELLS, (2, 1, 2), (0, 2, 1)])
def test_every_layout(tmp_path: Path, store: Path, source: Cell) -> None:
    """ZeRO 0 to 3, one and two tensor-parallel ranks, one to four processes."""
    check(tmp_path, store, source, [*CELLS, *itertools.product((0, 1, 2, 3), (1, 2), (1,))])
