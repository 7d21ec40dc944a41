"""The writer that a trainer holds: `save` takes a snapshot, a thread makes it a checkpoint."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nexa.checkpoint import catalog
from nexa.checkpoint.commit import Retention, SaveJob, clean, temporary
from nexa.checkpoint.exchange import MESSAGE_BYTES, Key, Link, allocate, collect
from nexa.checkpoint.files import discard
from nexa.checkpoint.fragment import Fragment
from nexa.checkpoint.layout import ParameterPlan, describe, make_plan
from nexa.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PAGE = 4096
"""Bytes; what is written to makes the kernel hand all of its page over."""
_RESERVED = {catalog.COMPLETE, catalog.MANIFEST, catalog.STATE, catalog.CONFIG, catalog.MODEL_INDEX}


class CheckpointWriter:
    """Writes checkpoints of one run into `root`, together with the same object on every other rank.

    `rank` and `world_size` are those within `group` (None: the default group, or no process group at all for one
    rank). `root` must be seen by all ranks. `keep_last` newest checkpoints stay, 0 keeps all; those of steps divisible
    by `permanent_every` always stay, 0 for none. With `asynchronous`, `save` returns when the snapshot is in CPU
    memory, where each rank holds about 1/world_size of weights and optimizer state. `timeout` in seconds is for
    another rank's files to appear.

    Left-overs of interrupted saves are removed here and at each save.
    """

    def __init__(
        self,
        root: Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        group: ProcessGroup | None = None,
        keep_last: int = 0,
        permanent_every: int = 0,
        asynchronous: bool = True,
        timeout: float = 1800.0,
        message_bytes: int = MESSAGE_BYTES,
    ) -> None:
        self.root = Path(root).absolute()
        self.asynchronous, self.timeout, self.message_bytes = asynchronous, timeout, message_bytes
        self.retention = Retention(keep_last, permanent_every)
        self.stall_seconds = 0.0
        """How long the last `save` kept the caller."""
        self._link = Link(rank, world_size, group)
        self._digests: list[int] = []
        self._plan: dict[str, ParameterPlan] = {}
        self._buffers: dict[Key, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if rank == 0:
            clean(self.root)

    @property
    def snapshot_bytes(self) -> int:
        """CPU memory that this rank's snapshot takes."""
        return sum(data.numel() * data.element_size() for data in self._buffers.values())

    def prepare(self, fragments: list[Fragment]) -> None:
        """Take the snapshot's memory in the background, so that the first `save` need not wait for it; collective.

        fragments: as they will be saved. Pages that no process had before cost more than what is written to them: 6.5 s
        a GiB on a virtual machine (docs/benchmarks.md).
        """
        self._join()
        mine = json.dumps(describe(fragments)).encode()
        rows = self._link.gather_numbers([_digest(mine), len(mine)])
        self._bring_up_to_date(mine, [row[0] for row in rows], [row[1] for row in rows])
        on_gpu = _on_gpu(fragments)
        self._thread = threading.Thread(target=self._take_memory, args=(on_gpu,), name="checkpoint-memory")
        self._thread.start()

    def _take_memory(self, pinned: bool) -> None:
        try:
            buffers = allocate(self._plan, self._link.rank, pinned=pinned)
            for buffer in buffers.values():
                buffer.view(torch.uint8).numpy()[::PAGE] = 0
            self._buffers = buffers
        except BaseException as error:
            self._error = error

    def save(
        self,
        step: int,
        fragments: list[Fragment],
        state: dict[str, Any],
        config: dict[str, Any],
        files: dict[str, Path] | None = None,
    ) -> None:
        """Write checkpoint `step`; collective. Waits first for the one before.

        `state` and `config` are JSON values, `files` maps names in the checkpoint to files to copy; of these three
        rank 0's count. The key `scalars` of the state is filled from the fragments. The fragments' tensors may change
        as soon as this returns. Raises UserError, on every rank, when the checkpoint before this one (or, if not
        asynchronous, this one) could not be written; the ones before stay intact. Raises ValueError when fragments do
        not make up whole parameters.
        """
        begin = time.monotonic()
        if taken := _RESERVED & set(files or {}):
            raise ValueError(f"names taken by the checkpoint itself: {sorted(taken)}")
        self._join()
        texts = json.dumps([state, config])  # a copy that later changes do not reach
        attempt = self._agree(step, fragments)
        by_name = {fragment.name: fragment for fragment in fragments}
        if not self._buffers:
            self._buffers = allocate(self._plan, self._link.rank, pinned=_on_gpu(fragments))
        collect(self._link, self._plan, by_name, self._buffers, self.message_bytes)
        # Of several owners of a parameter the first to give a piece tells its scalars.
        first = {name: next(iter(one.shards.values()))[0].rank for name, one in self._plan.items() if one.shards}
        job = SaveJob(
            root=self.root,
            step=step,
            attempt=attempt,
            rank=self._link.rank,
            world_size=self._link.world_size,
            plan=self._plan,
            buffers=self._buffers,
            scalars={f.name: dict(f.scalars) for f in fragments if f.scalars and first.get(f.name) == self._link.rank},
            state=json.loads(texts)[0],
            config=json.loads(texts)[1],
            extra=dict(files or {}) if self._link.rank == 0 else {},
            retention=self.retention,
            timeout=self.timeout,
        )
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"checkpoint-{step}")
        self._thread.start()
        if not self.asynchronous:
            self.wait()
        self.stall_seconds = time.monotonic() - begin

    def wait(self) -> None:
        """Return when the last checkpoint is complete. Raises UserError, on every rank, when it cannot be written."""
        self._join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """`wait`, then free the snapshot's memory; may be called again."""
        try:
            self.wait()
        finally:
            self._buffers, self._digests = {}, []

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, job: SaveJob) -> None:
        """Body of the thread."""
        try:
            job.run()
        except BaseException as error:
            self._error = error

    def _agree(self, step: int, fragments: list[Fragment]) -> str:
        """Make the directory, bring the plan up to date, agree on the attempt's id; raise on all ranks if one failed.

        One small all-gather when the layout is that of the last save.
        """
        mine = json.dumps(describe(fragments)).encode()
        number = secrets.randbits(48)
        tmp = temporary(self.root, step, f"{number:012x}")
        if self._error is None and self._link.rank == 0:
            try:
                tmp.mkdir(parents=True)
            except OSError as error:
                self._error = UserError(f"checkpoint of step {step}: {self.root}: {error.strerror}")
        rows = self._link.gather_numbers([_digest(mine), len(mine), number, int(self._error is not None)])
        attempt = f"{rows[0][2]:012x}"
        if failed := [rank for rank, row in enumerate(rows) if row[3]]:
            if self._link.rank == 0 and tmp.is_dir():
                discard(tmp)
            self._error = self._error or UserError(f"rank {failed[0]} could not write its part of a checkpoint")
            self.wait()
        self._bring_up_to_date(mine, [row[0] for row in rows], [row[1] for row in rows])
        return attempt

    def _bring_up_to_date(self, mine: bytes, digests: list[int], lengths: list[int]) -> None:
        """Make the plan again when the layout is not that of the last one. Of each rank's description: `mine` here, the
        digests and lengths of all."""
        if digests != self._digests:
            self._plan = make_plan(self._link.gather_descriptions(mine, lengths))
            self._digests, self._buffers = digests, {}


def _digest(description: bytes) -> int:
    return int.from_bytes(hashlib.sha256(description).digest()[:7], "big")


def _on_gpu(fragments: list[Fragment]) -> bool:
    return any(tensor.is_cuda for fragment in fragments for tensor in fragment.tensors.values())
