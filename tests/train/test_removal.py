"""A trained model loses its norms one by one, stopped and gone on with in between, and is folded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import nexa
from nexa.checkpoint.catalog import list_checkpoints
from nexa.checkpoint.load import load_state_dict
from nexa.errors import UserError
from nexa.interop.convert import convert
from nexa.interop.export import export
from tests.train.test_run import rows, train

FINE_TUNE = ("norm.removal.start=3", "norm.removal.every=2", "train.steps=14", "schedule.name=constant")


@pytest.fixture(scope="module")
def runs(embedded_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LayerNorm model; its fine-tuning in one go, with a stop after step 6, and on two ranks."""
    root = tmp_path_factory.mktemp("removal")
    kind = ("norm.kind=layernorm", "optim.eps=1e-6", "eval.every=1")
    train(embedded_cache, root / "base", "train.steps=4", *kind)
    start = (*kind, *FINE_TUNE, "resume.mode=weights_only", f"resume.path={root / 'base'}")
    train(embedded_cache, root / "whole", *start)
    train(embedded_cache, root / "broken", *start, "train.stop_at=6")
    train(embedded_cache, root / "broken", *start)
    layout = ("parallel.zero_stage=3", "parallel.tensor=2", "parallel.sequence=true")
    train(embedded_cache, root / "ranks", *start, *layout, "train.activation_checkpointing=full", processes=2)
    return {name: root / name for name in ("base", "whole", "broken", "ranks")}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_state_dict(list_checkpoints(run / "checkpoints")[-1])


def test_metrics_say_how_many_are_left(runs: dict[str, Path]) -> None:
    table = rows(runs["whole"])
    left = {row["step"]: row["removal/norms_left"] for row in table}
    assert left == {step: 5 - min(5, max(0, (step - 1) // 2)) for step in range(1, 15)}
    assert all(any(key.startswith("val/") for key in row) for row in table)
    state = weights(runs["whole"])
    assert {name for name in state if name.endswith(".removed")} == {
        *(
            f"model.layers.{i}.{norm}.removed"
            for i in (0, 1)
            for norm in ("input_layernorm", "post_attention_layernorm")
        ),
        "model.norm.removed",
    }
    assert all(tensor.item() == 1.0 for name, tensor in state.items() if name.endswith(".removed"))
    assert all(0.001 < tensor.item() < 10 for name, tensor in state.items() if name.endswith(".fixed_rms"))


def test_a_stop_in_between_changes_nothing(runs: dict[str, Path]) -> None:
    first, second = weights(runs["whole"]), weights(runs["broken"])
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    keys = ("loss", "removal/norms_left")
    assert [[row[k] for k in keys] for row in rows(runs["whole"])] == [
        [row[k] for k in keys] for row in rows(runs["broken"])
    ]


def test_another_layout_computes_the_same(runs: dict[str, Path]) -> None:
    """Two tensor ranks that share out tokens, ZeRO 3, every block computed twice."""
    for name, tensor in weights(runs["whole"]).items():
        torch.testing.assert_close(weights(runs["ranks"])[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


def test_folded_it_is_the_same_without_any_norm(runs: dict[str, Path], tmp_path: Path) -> None:
    done = convert(runs["whole"], tmp_path / "none", "none")
    assert not any("norm" in name for name in load_state_dict(done.path))
    model, folded = nexa.load_model(runs["whole"]), nexa.load_model(done.path)
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = model(ids), folded(ids)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    export(done.path, tmp_path / "hf")
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(ids).logits
    assert (again - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_too_early_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"norm\.removal\.start=null"):
        convert(runs["base"], tmp_path / "out", "none")
    with pytest.raises(UserError, match=r"norm\.removal\.start=3: its norms are being removed"):
        convert(runs["whole"], tmp_path / "out", "rmsnorm")
    early = next(path for path in list_checkpoints(runs["whole"] / "checkpoints") if path.name.endswith("04"))
    with pytest.raises(UserError, match=r"input_layernorm and 4 other norms still divide"):
        convert(early, tmp_path / "out", "none")
    with pytest.raises(UserError, match="--to none"):
        export(runs["whole"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
