"""Mistakes around a run: exit code 2, one message that names the key or file, no traceback, nothing lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipeline.embedded import embedded_store
from tests.conftest import run_command
from tests.train.test_run import arguments, losses, train

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def finished(embedded_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("bad") / "finished"
    train(embedded_cache, run_dir, "train.stop_at=8")
    return run_dir


@pytest.fixture
def store(embedded_cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(embedded_store(str(embedded_cache), 300), tmp_path / "store"))


def refused(cache: Path, run_dir: Path, *extra: str) -> str:
    """The one message of a run that must be refused."""
    done = run_command(*arguments(cache, run_dir, *extra))
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert "Traceback" not in output
    assert done.stderr.count("nexa: error:") == 1, done.stderr
    return done.stderr


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


STORE_DAMAGE: list[tuple[str, Damage, str]] = [
    ("missing", shutil.rmtree, r"store"),
    ("empty", lambda p: [f.unlink() for f in p.iterdir()], r"store"),  # type: ignore[list-item, return-value]
    ("truncated", lambda p: truncate(p / "train_00000.bin"), r"train_00000\.bin"),
    ("no index", lambda p: (p / "train_00000.idx").unlink(), r"train_00000\.idx"),
    ("index magic", lambda p: flip(p / "train_00000.idx", 0), r"train_00000\.idx"),
    ("manifest", lambda p: (p / "manifest.json").write_text("{"), r"manifest\.json"),  # type: ignore[list-item, return-value]
    ("tokenizer", lambda p: flip(p / "tokenizer.json", 5), r"tokenizer\.json"),
]


@pytest.mark.parametrize(
    ("damage", "named"), [case[1:] for case in STORE_DAMAGE], ids=[case[0] for case in STORE_DAMAGE]
)
def test_store(store: Path, embedded_cache: Path, tmp_path: Path, damage: Damage, named: str) -> None:
    damage(store)
    assert re.search(named, refused(embedded_cache, tmp_path / "run", f"data.source={store}"))


CONFIGURED: list[tuple[str, list[str], str]] = [
    ("vocabulary", ["data.tokenizer_vocab_size=300", "model.vocab_size=299"], r"vocab_size"),
    ("sequence", ["data.sequence_length=30000000", "model.max_position_embeddings=40000000"], r"data\.sequence_length"),
    ("evaluation source", ["eval.sources=[/nowhere/store]"], r"/nowhere/store"),
    ("resume path", ["resume.mode=continue", "resume.path=/nowhere/run"], r"/nowhere/run"),
    ("tokenizer", ["data.tokenizer=bytes"], r"data\.tokenizer=bytes"),
    ("flash", ["model.attention=flash", "train.precision=bf16"], r"model\.attention=flash"),
    ("cache", ["data.cache_dir=/proc/nexa"], r"/proc/nexa"),
    ("run folder", ["run.dir=/proc/nexa"], r"/proc/nexa"),
    ("batch", ["train.global_batch_size=10"], r"train\.global_batch_size"),
    ("experiment", ["+exp=mixln_1bb"], r"mixln_1b"),
    ("typo", ["model.hiden_size=64"], r"model\.hidden_size"),
]


@pytest.mark.parametrize(("extra", "named"), [case[1:] for case in CONFIGURED], ids=[case[0] for case in CONFIGURED])
def test_configured(embedded_cache: Path, tmp_path: Path, extra: list[str], named: str) -> None:
    assert re.search(named, refused(embedded_cache, tmp_path / "run", *extra))


CHECKPOINT_DAMAGE: list[tuple[str, Damage, str]] = [
    ("weights", lambda p: flip(p / "model.safetensors", -7), r"step_00000008.*model\.safetensors"),
    ("state", lambda p: flip(p / "state.json", 30), r"step_00000008.*state\.json"),
    ("truncated", lambda p: truncate(p / "model.safetensors"), r"step_00000008.*model\.safetensors"),
]


@pytest.mark.parametrize(
    ("damage", "named"), [case[1:] for case in CHECKPOINT_DAMAGE], ids=[case[0] for case in CHECKPOINT_DAMAGE]
)
def test_damaged_checkpoint(finished: Path, embedded_cache: Path, tmp_path: Path, damage: Damage, named: str) -> None:
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    damage(run_dir / "checkpoints" / "step_00000008")
    before = (run_dir / "metrics.jsonl").read_bytes()
    message = refused(embedded_cache, run_dir)
    assert re.search(named, message)
    assert "step_00000004" in message, "the way out is named"
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    earlier = f"resume.path={run_dir}/checkpoints/step_00000004"
    train(embedded_cache, tmp_path / "other", "resume.mode=continue", earlier, "train.stop_at=8")
    assert losses(tmp_path / "other") == losses(finished)[4:8]


def test_checkpoint_without_marker_does_not_exist(finished: Path, embedded_cache: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    (run_dir / "checkpoints" / "step_00000008" / "COMPLETE").unlink()
    done = train(embedded_cache, run_dir, "train.stop_at=8")
    assert "step_00000004" in done.stdout
    assert losses(run_dir) == losses(finished)
    target = f"{tmp_path}/bare"
    shutil.copytree(finished / "checkpoints" / "step_00000008", target)
    Path(target, "COMPLETE").unlink()
    assert "COMPLETE" in refused(embedded_cache, tmp_path / "new", "resume.mode=weights_only", f"resume.path={target}")


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["model.num_hidden_layers=3"], r"model\.layers\.2"),
        (["model.intermediate_size=64"], r"mlp\..*shape|shape.*mlp\."),
        (["norm.placement=post"], r"attn_norm\.residual"),
        (["train.seed=5"], r"seed"),
        (["resume.mode=none"], r"resume\.mode=none"),
    ],
    ids=["deeper", "wider", "placement", "order", "none"],
)
def test_another_model_or_order(
    finished: Path, embedded_cache: Path, tmp_path: Path, extra: list[str], named: str
) -> None:
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    assert re.search(named, refused(embedded_cache, run_dir, *extra))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0 or os.getuid() != 0:
        pytest.skip("a small file system needs root; tests/checkpoint has the same case with a failing write")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_full_disk(small_disk: Path, embedded_cache: Path) -> None:
    """The second checkpoint does not fit: the first one stays whole, and there is no torn one."""
    message = refused(
        embedded_cache, small_disk / "run", "checkpoint.keep_last=0", "train.steps=40", "model.hidden_size=64"
    )
    assert str(small_disk) in message
    kept = sorted((small_disk / "run" / "checkpoints").glob("step_*"))
    assert kept
    assert all((path / "COMPLETE").exists() for path in kept)
