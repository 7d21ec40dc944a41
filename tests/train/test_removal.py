"""A trained model loses its norms one by one, killed and gone on with in between, and is folded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import nexa
from nexa.checkpoint.catalog import list_checkpoints
from nexa.checkpoint.load import load_state_dict
from nexa.errors import UserError
from nexa.interop.convert import convert
from nexa.interop.export import export
from nexa.interop.import_ import import_folder
from tests.cli.common import tiny_model, write_checkpoint
from tests.train.test_run import rows, train

SIZES = {"vocab_size": 300, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
FINE_TUNE = (
    "norm.kind=layernorm",
    "norm.eps=1e-4",
    "model.rope_theta=500",
    "norm.removal.start=3",
    "norm.removal.every=2",
    "train.steps=14",
    "schedule.name=constant",
    "optim.eps=1e-6",
    "eval.every=1",
    "checkpoint.keep_last=0",
    "resume.mode=weights_only",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LayerNorm model with gains and biases of all sizes."""
    root = tmp_path_factory.mktemp("removal")
    export(write_checkpoint(tiny_model(kind="layernorm", **SIZES), root / "model"), root / "hf")
    return import_folder(root / "hf", root / "base").path


@pytest.fixture(scope="module")
def whole(base: Path, embedded_cache: Path) -> Path:
    """Its fine-tuning in one go."""
    run = base.parent / "whole"
    train(embedded_cache, run, *FINE_TUNE, f"resume.path={base}")
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_state_dict(list_checkpoints(run / "checkpoints")[-1])


def test_metrics_say_how_many_are_left(whole: Path) -> None:
    table = rows(whole)
    left = {row["step"]: row["removal/norms_left"] for row in table}
    assert left == {step: 5 - min(5, max(0, (step - 1) // 2)) for step in range(1, 15)}
    assert all(any(key.startswith("val/") for key in row) for row in table)
    state = weights(whole)
    removed = {name.removesuffix(".removed") for name in state if name.endswith(".removed")}
    blocks = [f"model.layers.{i}.{norm}" for i in (0, 1) for norm in ("input_layernorm", "post_attention_layernorm")]
    assert removed == {*blocks, "model.norm"}
    assert all(state[f"{name}.removed"].item() == 1.0 for name in removed)
    assert all(0.001 < state[f"{name}.fixed_rms"].item() < 100 for name in removed)


def test_the_first_constant_is_frozen_and_the_last_one_still_moves(whole: Path) -> None:
    """Between steps 4 and 8: the first went after step 3, the last goes after step 11."""
    early, late = (load_state_dict(path) for path in list_checkpoints(whole / "checkpoints")[:2])
    first, last = "model.layers.0.post_attention_layernorm.fixed_rms", "model.norm.fixed_rms"
    assert torch.equal(early[first], late[first])
    assert not torch.equal(early[last], late[last])


def test_killed_in_between_it_ends_the_same(whole: Path, base: Path, embedded_cache: Path, tmp_path: Path) -> None:
    """Gone on with from step 8, two norms before the end."""
    again = shutil.copytree(whole, tmp_path / "again")
    for path in list_checkpoints(again / "checkpoints")[2:]:
        shutil.rmtree(path)
    train(embedded_cache, again, *FINE_TUNE, f"resume.path={base}")
    first, second = weights(whole), weights(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    keys = ("loss", "removal/norms_left")
    assert [[row[key] for key in keys] for row in rows(whole)] == [[row[key] for key in keys] for row in rows(again)]


@pytest.mark.slow
def test_another_layout_computes_the_same(whole: Path, base: Path, embedded_cache: Path, tmp_path: Path) -> None:
    """Two tensor ranks that share out tokens, ZeRO 3, every block computed twice; and two data-parallel ones."""
    sequence = ("parallel.tensor=2", "parallel.sequence=true", "train.activation_checkpointing=full")
    for name, layout in {"tensor": ("parallel.zero_stage=3", *sequence), "data": ("parallel.zero_stage=1",)}.items():
        train(embedded_cache, tmp_path / name, *FINE_TUNE, f"resume.path={base}", *layout, processes=2)
        found = weights(tmp_path / name)
        for key, tensor in weights(whole).items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-4, msg=f"{name} {key}")


def test_folded_it_is_the_same_without_any_norm(whole: Path, tmp_path: Path) -> None:
    done = convert(whole, tmp_path / "none", "none")
    assert not any("norm" in name for name in load_state_dict(done.path))
    model, folded = nexa.load_model(whole), nexa.load_model(done.path)
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    export(done.path, tmp_path / "hf")
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        wanted = model(ids)
        for found in (folded(ids), AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(ids).logits):
            assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_too_early_is_refused(whole: Path, base: Path, tmp_path: Path) -> None:
    early = list_checkpoints(whole / "checkpoints")[0]
    for source, target, message in [
        (base, "none", r"norm\.removal\.start=null"),
        (whole, "rmsnorm", r"norm\.removal\.start=3: its norms are being removed"),
        (early, "none", r"and 3 other norms still divide"),
    ]:
        with pytest.raises(UserError, match=message):
            convert(source, tmp_path / "out", target)
    with pytest.raises(UserError, match="--to none"):
        export(whole, tmp_path / "out")
    assert not (tmp_path / "out").exists()
