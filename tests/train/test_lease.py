"""One live run to a folder, on this host and between hosts."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path

import pytest

from nexa.config import compose
from nexa.errors import UserError
from nexa.train import folder
from nexa.train.lease import Lease

RENEW, PATIENCE = 0.05, 60.0
"""Patience that nothing here can be so slow as to use up, except where it must be."""


def on(host: str, job: str | None = None, start: int = 0, token: str | None = None) -> dict:
    token = token or f"{host}{job}{start}"
    return {"host": host, "boot": f"boot of {host}", "pid": 1, "job": job, "start": start, "token": token}


def lease(path: Path, who: dict, lost: list[str] | None = None, patience: float = PATIENCE) -> Lease:
    return Lease(path, who=who, renew=RENEW, patience=patience, lost=([] if lost is None else lost).append)


def dies(held: Lease, path: Path) -> None:
    """What SIGKILL leaves: the lock is gone, the file is as it was."""
    text = path.read_bytes()
    held.release()
    path.write_bytes(text)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system whose locks the other host does not see."""

    def refuse(file: object, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_second_run_on_this_host_is_refused_at_once(tmp_path: Path) -> None:
    first = lease(tmp_path / ".lock", on("a", "7"))
    first.take()
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"another run is writing here \(process 1 on a, job 7\)"):
        lease(tmp_path / ".lock", on("a")).take()
    assert time.monotonic() - begin < PATIENCE / 2
    first.release()


@pytest.mark.usefixtures("no_locks")
def test_a_live_run_on_another_host_is_noticed(tmp_path: Path) -> None:
    lost: list[str] = []
    first = lease(tmp_path / ".lock", on("a", "7"), lost)
    first.take()
    with pytest.raises(UserError, match=r"run\.dir=.*another run is writing here \(process 1 on a, job 7\)"):
        lease(tmp_path / ".lock", on("b", "8")).take()
    time.sleep(4 * RENEW)
    first.release()
    assert lost == []


@pytest.mark.usefixtures("no_locks")
def test_after_a_clean_end_nobody_waits(tmp_path: Path) -> None:
    first = lease(tmp_path / ".lock", on("a"))
    first.take()
    first.release()
    first.release()
    begin = time.monotonic()
    second = lease(tmp_path / ".lock", on("b"))
    second.take()
    assert time.monotonic() - begin < PATIENCE / 2
    second.release()


@pytest.mark.usefixtures("no_locks")
def test_a_dead_holder_on_another_host_is_waited_out(tmp_path: Path) -> None:
    first = lease(tmp_path / ".lock", on("a"))
    first.take()
    dies(first, tmp_path / ".lock")
    begin = time.monotonic()
    second = lease(tmp_path / ".lock", on("b"), patience=0.5)
    second.take()
    assert time.monotonic() - begin >= 0.5
    second.release()


@pytest.mark.parametrize(
    ("holder", "successor"),
    [(on("a"), on("a", token="another")), (on("a", "7", 0), on("b", "7", 1))],
    ids=["the same host", "the next start of the job"],
)
def test_a_certain_successor_does_not_wait(tmp_path: Path, holder: dict, successor: dict) -> None:
    first = lease(tmp_path / ".lock", holder)
    first.take()
    dies(first, tmp_path / ".lock")
    begin = time.monotonic()
    second = lease(tmp_path / ".lock", successor)
    second.take()
    assert time.monotonic() - begin < PATIENCE / 2
    second.release()


@pytest.mark.usefixtures("no_locks")
def test_a_cut_off_holder_ends_when_its_job_starts_again(tmp_path: Path) -> None:
    lost: list[str] = []
    first = lease(tmp_path / ".lock", on("a", "7", 0), lost)
    first.take()
    second = lease(tmp_path / ".lock", on("b", "7", 1))
    second.take()
    end = time.monotonic() + PATIENCE
    while not lost and time.monotonic() < end:
        time.sleep(RENEW)
    assert len(lost) == 1 and "taken over by process 1 on b, job 7" in lost[0]
    first.release()
    with pytest.raises(UserError, match="process 1 on b, job 7"):
        lease(tmp_path / ".lock", on("c", "9")).take()  # the first one's end has not freed what the second holds
    second.release()


def test_a_file_of_an_earlier_version_or_garbage_is_free(tmp_path: Path) -> None:
    for text in (b"", b"{", b"[]", b'{"host": "a"}'):
        (tmp_path / ".lock").write_bytes(text)
        held = lease(tmp_path / ".lock", on("b"))
        held.take()
        held.release()
        assert (tmp_path / ".lock").read_bytes() == b""


def test_a_run_folder_is_held_until_it_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "environment", lambda topology: {})
    cfg = compose(["+exp=quickstart", f"run.dir={tmp_path}/run"])
    first, second = folder.RunFolder(cfg), folder.RunFolder(cfg)
    first.open(cfg, None)
    with pytest.raises(UserError, match=r"run\.dir=.*/run: another run is writing here"):
        second.open(cfg, None)
    first.close()
    second.open(cfg, None)
    second.close()
