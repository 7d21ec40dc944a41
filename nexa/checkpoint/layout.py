"""Who writes what: from every rank's fragments to one writer per logical parameter.

Pure functions of the gathered descriptions: every rank computes the same plan without talking.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nexa.checkpoint.fragment import WEIGHT, Fragment
from nexa.checkpoint.safetensors_io import DTYPE_NAMES, DTYPES

Description = list[list]
"""JSON of one rank's fragments: [name, shape, [[start, stop, offset], …], {state: dtype name}] each."""


@dataclass(frozen=True, order=True)
class Piece:
    """Elements [start, stop) of a whole tensor, lying from `offset` on in the 1-D tensors of rank `rank`."""

    start: int
    stop: int
    rank: int
    offset: int


@dataclass(frozen=True)
class ParameterPlan:
    """One logical parameter: rank `writer` puts it together from `pieces`, which tile it in order."""

    name: str
    shape: tuple[int, ...]
    states: dict[str, str]
    writer: int
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return _nbytes(self.shape, self.states.values())


@dataclass
class _Gathered:
    """What all ranks said about one parameter."""

    shape: tuple[int, ...]
    states: dict[str, str]
    held: list[Piece]


def describe(fragments: list[Fragment]) -> Description:
    """What the other ranks must know of this rank's fragments. Raises ValueError for two fragments of one name."""
    names = [fragment.name for fragment in fragments]
    if len(set(names)) != len(names):
        raise ValueError(
            f"two fragments of one parameter on one rank: {sorted({n for n in names if names.count(n) > 1})}"
        )
    return [
        [f.name, list(f.shape), [list(r) for r in f.ranges], {s: DTYPE_NAMES[t.dtype] for s, t in f.tensors.items()}]
        for f in fragments
    ]


def make_plan(descriptions: list[Description]) -> dict[str, ParameterPlan]:
    """The plan for `descriptions[rank]`, by parameter name.

    The tensors of one writer take at most (bytes of all tensors) / (number of ranks) + the largest parameter's bytes.
    A parameter several ranks own (replicas) is taken from its writer's own memory where possible. Raises ValueError
    when ranks disagree on a parameter or nobody owns a part of it.
    """
    gathered = _gather(descriptions)
    writers = _assign(gathered, len(descriptions))
    return {
        name: ParameterPlan(name, one.shape, one.states, writers[name], _cover(name, one, writers[name]))
        for name, one in sorted(gathered.items())
    }


def file_names(plan: Mapping[str, ParameterPlan], rank: int) -> dict[str, str]:
    """{"model": name, "optimizer": name} of the files that `rank` writes; a kind it has nothing of is absent.

    A lone file of weights is `model.safetensors`, several are numbered, as Hugging Face has it.
    """
    names: dict[str, str] = {}
    for kind in ("model", "optimizer"):
        ranks = sorted({one.writer for one in plan.values() if any(kind_of(state) == kind for state in one.states)})
        if rank in ranks:
            number = f"{ranks.index(rank) + 1:05d}-of-{len(ranks):05d}"
            names[kind] = "model.safetensors" if kind == "model" and len(ranks) == 1 else f"{kind}-{number}.safetensors"
    return names


def kind_of(state: str) -> str:
    """The kind of file a state goes into."""
    return "model" if state == WEIGHT else "optimizer"


def file_key(state: str, name: str) -> str:
    """Name of a tensor inside its file: weights as they are, optimizer state as `<state>/<parameter>`."""
    return name if state == WEIGHT else f"{state}/{name}"


def _nbytes(shape: tuple[int, ...], dtypes: Iterable[str]) -> int:
    return math.prod(shape) * sum(DTYPES[dtype].itemsize for dtype in dtypes)


def _gather(descriptions: list[Description]) -> dict[str, _Gathered]:
    """Merge the ranks' descriptions by parameter."""
    gathered: dict[str, _Gathered] = {}
    for rank, description in enumerate(descriptions):
        for name, shape, ranges, states in description:
            one = gathered.setdefault(name, _Gathered(tuple(shape), states, []))
            # A rank that owns no element may have no state either.
            if one.shape != tuple(shape) or (ranges and one.held and one.states != states):
                raise ValueError(f"{name}: rank {rank} has {shape} {states}, another {one.shape} {one.states}")
            if ranges and not one.held:
                one.states = states
            one.held.extend(Piece(start, stop, rank, offset) for start, stop, offset in ranges)
    return gathered


def _assign(gathered: dict[str, _Gathered], world_size: int) -> dict[str, int]:
    """A writer for each parameter: the rank that owns most of it while its share is fair, else the least loaded."""
    cost = {name: _nbytes(one.shape, one.states.values()) for name, one in gathered.items()}
    fair = sum(cost.values()) / world_size
    load = [0] * world_size
    writers: dict[str, int] = {}
    for name in sorted(cost, key=lambda n: (-cost[n], n)):
        owned = dict.fromkeys((piece.rank for piece in gathered[name].held), 0)
        for piece in gathered[name].held:
            owned[piece.rank] += piece.stop - piece.start
        main = min(owned, key=lambda rank: (-owned[rank], load[rank], rank), default=0)
        least = min(range(world_size), key=lambda rank: (load[rank], rank))
        writers[name] = main if load[main] + cost[name] <= fair else least
        load[writers[name]] += cost[name]
    return writers


def _cover(name: str, one: _Gathered, writer: int) -> tuple[Piece, ...]:
    """Pieces that tile the parameter without overlap: the writer's own, else the longest, else the lowest rank's."""
    held = sorted(one.held)
    own = [piece for piece in held if piece.rank == writer]
    tiles: list[Piece] = []
    at, numel, seen, live = 0, math.prod(one.shape), 0, []
    while at < numel:
        while seen < len(held) and held[seen].start <= at:
            live.append(held[seen])
            seen += 1
        live = [piece for piece in live if piece.stop > at]
        if not live:
            raise ValueError(f"{name}: element {at} of {numel} belongs to no rank")
        best = min(live, key=lambda piece: (piece.rank != writer, -piece.stop, piece.rank))
        stop = best.stop
        if best.rank != writer:
            stop = min([stop, *(piece.start for piece in own if piece.start > at)])
        tiles.append(Piece(at, stop, best.rank, best.offset + at - best.start))
        at = stop
    return tuple(tiles)
