"""Damaged, unfinished and foreign folders, a full disk: one message each, naming the file."""

import errno
import json
import os
import shutil

import pytest

from nexa.checkpoint import files
from nexa.checkpoint.load import find, list_checkpoints, load_fragments, read_state, verify
from nexa.checkpoint.save import CheckpointWriter
from nexa.errors import UserError

from .common import blank, cut, whole

FILES = ["model.safetensors", "optimizer-00001-of-00001.safetensors", "state.json", "config.json", "manifest.json"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    writer = CheckpointWriter(root)
    for step in (1, 2):
        writer.save(step, cut(whole(step), 0, 1, 0), {"tokens": 7}, {"model_type": "llama"}, {})
    writer.close()
    return root


@pytest.fixture
def newest(original, tmp_path):
    shutil.copytree(original, tmp_path / "checkpoints")
    return tmp_path / "checkpoints" / "step_00000002"


def _error(action, *args) -> str:
    with pytest.raises(UserError) as caught:
        action(*args)
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit(newest, name):
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / name).write_bytes(content)
    message = _error(verify, newest)
    assert name in message
    assert "resume.path=" in message
    assert "step_00000001" in message


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short(newest, name):
    os.truncate(newest / name, (newest / name).stat().st_size - 1)
    assert name in _error(verify, newest)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(newest, name):
    (newest / name).unlink()
    message = _error(verify, newest)
    assert name in message
    assert "No such file" in message


def test_every_file_is_hashed_by_some_rank(newest):
    for name in FILES[:4]:
        content = (newest / name).read_bytes()
        (newest / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        failing = [rank for rank in range(3) if _fails(newest, rank)]
        assert len(failing) == 1, name
        (newest / name).write_bytes(content)


def _fails(path, rank) -> bool:
    try:
        verify(path, rank, 3)
    except UserError:
        return True
    return False


def test_damage_that_only_loading_meets(newest):
    os.truncate(newest / "model.safetensors", 100)
    assert "model.safetensors" in _error(load_fragments, newest, blank(whole(2), 0, 1, 0))
    (newest / "state.json").write_text("{}")
    assert "state.json" in _error(read_state, newest)


def test_no_marker(newest):
    (newest / "COMPLETE").unlink()
    assert [p.name for p in list_checkpoints(newest.parent)] == ["step_00000001"]
    assert find(newest.parent).name == "step_00000001"
    for action in (find, verify, read_state):
        message = _error(action, newest)
        assert "no COMPLETE marker" in message
        assert f"resume.path={newest.parent / 'step_00000001'}" in message
    shutil.rmtree(newest.parent / "step_00000001")
    assert "no other complete checkpoint" in _error(find, newest)
    assert "only unfinished ones (step_00000002)" in _error(find, newest.parent)


def test_a_newer_format(newest):
    manifest = json.loads((newest / "manifest.json").read_text()) | {"version": 99}
    for name in ("manifest.json", "COMPLETE"):
        (newest / name).unlink()
    record = files.write_json(newest / "manifest.json", manifest)
    files.write_json(newest / "COMPLETE", {"manifest_sha256": record.sha256})
    assert "version 99" in _error(verify, newest)


def test_what_find_takes(newest):
    assert find(newest) == newest
    assert find(str(newest.parent)) == newest
    assert find(newest.parent.parent) == newest


def test_what_find_refuses(tmp_path):
    assert "does not exist" in _error(find, tmp_path / "none")
    (tmp_path / "file").write_text("")
    assert "is a file" in _error(find, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "holds no complete checkpoint" in _error(find, tmp_path / "empty")
    for inside in ("run/global_step10", "tag/mp_rank_00_model_states.pt"):
        (tmp_path / inside).mkdir(parents=True)
        message = _error(find, tmp_path / inside.split("/")[0])
        assert "DeepSpeed" in message
        assert "zero_to_fp32" in message
    (tmp_path / "hf").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "hf" / name).write_text("{}")
    assert "nexa import" in _error(find, tmp_path / "hf")


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
def test_a_full_disk(tmp_path, monkeypatch, asynchronous, kind, share):
    """The write that does not fit fails, wherever it is; the checkpoint before stays, nothing else does."""
    writer = CheckpointWriter(tmp_path, asynchronous=asynchronous, keep_last=1)
    writer.save(1, cut(whole(1), 0, 1, 0), {}, {})
    writer.wait()
    size = sum(p.stat().st_size for p in find(tmp_path).iterdir())
    room, real = [int(size * share)], files.write_all

    def limited(fd, piece):
        if len(piece) > room[0]:
            raise OSError(kind, os.strerror(kind))
        room[0] -= len(piece)
        real(fd, piece)

    monkeypatch.setattr(files, "write_all", limited)
    save = lambda step: writer.save(step, cut(whole(step), 0, 1, 0), {}, {})  # noqa: E731
    if asynchronous:
        save(2)
        message = _error(save, 3)
    else:
        message = _error(save, 2)
    assert str(tmp_path) in message
    assert "step 2" in message
    if kind != errno.EACCES:
        assert f"needs {writer.snapshot_bytes} bytes" in message
        assert "checkpoint.keep_last" in message
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    monkeypatch.undo()
    save(4)
    writer.close()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000004"]
    verify(find(tmp_path))


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    writer = CheckpointWriter(tmp_path / "file" / "checkpoints")
    assert "file/checkpoints: Not a directory" in _error(writer.save, 1, cut(whole(1), 0, 1, 0), {}, {})
