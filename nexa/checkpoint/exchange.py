"""Fragments to their writers: collectives and messages of one save, all from the calling thread."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from nexa.checkpoint.fragment import Fragment
from nexa.checkpoint.layout import Description, ParameterPlan, Piece
from nexa.checkpoint.safetensors_io import DTYPES, as_bytes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MESSAGE_BYTES = 32 << 20
"""Largest message; a rank holds one outgoing and one incoming at a time."""

Key = tuple[str, str]
"""(state, parameter name)."""


class Link:
    """The ranks of one process group (None with several ranks: the default group), or a single process without one."""

    def __init__(self, rank: int, world_size: int, group: ProcessGroup | None) -> None:
        self.rank, self.world_size, self.group = rank, world_size, group
        on_gpu = world_size > 1 and dist.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def gather_numbers(self, numbers: list[int]) -> list[list[int]]:
        """Every rank's list of 63-bit numbers, by rank."""
        if self.world_size == 1:
            return [numbers]
        mine = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        rows = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(rows, mine, group=self.group)
        return [row.tolist() for row in rows]

    def gather_descriptions(self, mine: bytes, lengths: list[int]) -> list[Description]:
        """Every rank's description; `mine` is this rank's as JSON, `lengths` the byte counts of all."""
        if self.world_size == 1:
            return [json.loads(mine)]
        row = torch.zeros(max(lengths), dtype=torch.uint8, device=self.device)
        row[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        rows = [torch.empty_like(row) for _ in range(self.world_size)]
        dist.all_gather(rows, row, group=self.group)
        return [json.loads(bytes(one[:n].cpu().numpy())) for one, n in zip(rows, lengths, strict=True)]

    def trade(self, to: int, outgoing: ByteStream, source: int, incoming: ByteStream, message_bytes: int) -> None:
        """Send all of `outgoing` to one rank while receiving all of `incoming` from another, in bounded messages."""
        send = torch.empty(min(message_bytes, outgoing.left), dtype=torch.uint8, device=self.device)
        receive = torch.empty(min(message_bytes, incoming.left), dtype=torch.uint8, device=self.device)
        while outgoing.left or incoming.left:
            operations: list[dist.P2POp] = []
            sent, received = send[: outgoing.left], receive[: incoming.left]
            if sent.numel():
                outgoing.copy_out(sent)
                operations.append(dist.P2POp(dist.isend, sent, self._global(to), self.group))
            if received.numel():
                operations.append(dist.P2POp(dist.irecv, received, self._global(source), self.group))
            for work in dist.batch_isend_irecv(operations):
                work.wait()
            incoming.copy_in(received)

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


class ByteStream:
    """1-D tensors, end to end, as one row of bytes that is read or filled from front to back."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._parts = [as_bytes(tensor.detach()) for tensor in tensors]
        self._index, self._at = 0, 0
        self.left = sum(part.numel() for part in self._parts)
        """Bytes not yet passed."""

    def copy_out(self, message: torch.Tensor) -> None:
        """Fill `message` with the next bytes."""
        for part, piece in self._walk(message):
            piece.copy_(part)

    def copy_in(self, message: torch.Tensor) -> None:
        """Put `message` into the next bytes."""
        for part, piece in self._walk(message):
            part.copy_(piece)

    def _walk(self, message: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        done = 0
        while done < message.numel():
            part = self._parts[self._index]
            count = min(part.numel() - self._at, message.numel() - done)
            yield part[self._at : self._at + count], message[done : done + count]
            done, self._at, self.left = done + count, self._at + count, self.left - count
            if self._at == part.numel():
                self._index, self._at = self._index + 1, 0


def allocate(plan: Mapping[str, ParameterPlan], rank: int, pinned: bool) -> dict[Key, torch.Tensor]:
    """CPU memory for the parameters that `rank` writes, flat, shard after shard; pinned for fast copies from a GPU."""
    return {
        (state, one.name): torch.empty(one.numel, dtype=DTYPES[dtype], pin_memory=pinned)
        for one in plan.values()
        if one.writer == rank
        for state, dtype in one.states.items()
    }


def collect(
    link: Link,
    plan: Mapping[str, ParameterPlan],
    fragments: Mapping[str, Fragment],
    buffers: Mapping[Key, torch.Tensor],
    message_bytes: int = MESSAGE_BYTES,
) -> None:
    """Fill `buffers` (this rank's from `allocate`) with the ranks' fragments; collective.

    In round k each rank sends to the k-th rank after it and receives from the k-th before it: no pair waits on a
    circle, and a rank with nothing for a partner skips it on both sides.
    """
    outgoing: dict[int, list[torch.Tensor]] = {}
    incoming: dict[int, list[torch.Tensor]] = {}
    for one, at, piece in _mine(plan, link.rank):
        for state in sorted(one.states):
            if piece.rank == link.rank:
                source = fragments[one.name].tensors[state][piece.offset : piece.offset + piece.stop - piece.start]
            if one.writer == link.rank:
                target = buffers[state, one.name][at + piece.start : at + piece.stop]
            if piece.rank == one.writer:
                target.copy_(source.detach(), non_blocking=True)
            elif piece.rank == link.rank:
                outgoing.setdefault(one.writer, []).append(source)
            else:
                incoming.setdefault(piece.rank, []).append(target)
    for shift in range(1, link.world_size):
        to, source_rank = (link.rank + shift) % link.world_size, (link.rank - shift) % link.world_size
        link.trade(
            to, ByteStream(outgoing.get(to, ())), source_rank, ByteStream(incoming.get(source_rank, ())), message_bytes
        )
    if any(tensor.is_cuda for fragment in fragments.values() for tensor in fragment.tensors.values()):
        torch.cuda.synchronize()


def _mine(plan: Mapping[str, ParameterPlan], rank: int) -> Iterator[tuple[ParameterPlan, int, Piece]]:
    """The pieces that `rank` holds or writes and where their shard begins in the buffer, in one order on all ranks."""
    for one in plan.values():
        at = 0
        for shard, pieces in one.shards.items():
            for piece in pieces:
                if rank in (piece.rank, one.writer):
                    yield one, at, piece
            at += shard.numel
