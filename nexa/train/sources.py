"""The training stores of a configuration, and the order in which their samples come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_pipeline.batches import TrainBatches
from data_pipeline.embedded import embedded_store
from data_pipeline.hub import PREFIX, HubSource, HubStream
from data_pipeline.order import Stage, first_beyond, stage_starts
from data_pipeline.store import PackedStore, open_store
from data_pipeline.tokenizer import load_tokenizer
from nexa.checkpoint.load import find, list_checkpoints, read_state
from nexa.config import load
from nexa.config.schema import Config, MixtureSource
from nexa.diagnostics.data import run_of
from nexa.errors import UserError
from nexa.parallel.topology import Topology


@dataclass(frozen=True)
class Sources:
    """Training stores in the order in which the configuration first names them.

    mixtures: weights of `data.source` and of every stage, one for each store, 0 where it is not named.
    in_file_order, max_epochs: of each store. replay: None without `data.replay_from`.
    """

    paths: list[Path]
    stores: list[PackedStore]
    mixtures: list[list[float]]
    in_file_order: list[bool]
    max_epochs: list[float | None]
    replay: Replayed | None = None
    stream: HubStream | None = None
    """In the place of all stores."""

    @property
    def first(self) -> PackedStore | HubStream:
        """The source whose tokenizer is the run's."""
        return self.stream if self.stream is not None else self.stores[0]

    @property
    def every_path(self) -> list[Path]:
        """All stores, with those of the runs replayed, each once."""
        older = self.replay.sources.every_path if self.replay is not None else []
        return list({path.resolve(): path for path in reversed([*self.paths, *older])}.values())[::-1]


@dataclass(frozen=True)
class Replayed:
    """Another run's data: its folder, its configuration, its stores, and the samples at which its stages began."""

    run: Path
    cfg: Config
    sources: Sources
    starts: list[int]


def open_sources(cfg: Config, topology: Topology) -> Sources:
    """Training stores, with those of the run replayed, or the stream; an embedded corpus is built on first use.

    Raises UserError for a store or stream that cannot be read, a vocabulary larger than the model's, tokenizers that
    differ, and a run that cannot be replayed.
    """
    sources = _open(cfg, topology, frozenset({Path(cfg.run.dir).resolve()}))
    stores = _with_replayed(sources)
    for store in [sources.stream] if sources.stream is not None else stores:
        if store.vocab_size is not None and store.vocab_size > cfg.model.vocab_size:
            raise UserError(
                f"model.vocab_size={cfg.model.vocab_size} is smaller than the vocabulary of {store.name} "
                f"({store.vocab_size} tokens): set model.vocab_size to at least {store.vocab_size}"
            )
    _one_tokenizer(cfg, stores)
    return sources


def _with_replayed(sources: Sources) -> list[PackedStore]:
    return [*sources.stores, *(_with_replayed(sources.replay.sources) if sources.replay is not None else [])]


def _one_tokenizer(cfg: Config, stores: list[PackedStore]) -> None:
    """Token ids must mean the same in every source, and what `data.tokenizer` says they mean."""
    known = [(store.location, store.tokenizer_hash) for store in stores if store.tokenizer_hash is not None]
    if cfg.data.tokenizer is not None:
        known.insert(0, (f"data.tokenizer={cfg.data.tokenizer}", load_tokenizer(cfg.data.tokenizer).hash))
    for place, digest in known[1:]:
        if digest != known[0][1]:
            raise UserError(
                f"{place} was tokenised with another tokenizer than {known[0][0]} ({digest} against {known[0][1]}); "
                "prepare the sources with one tokenizer, or set data.tokenizer=null to take the store's own"
            )


def _mixtures(cfg: Config, topology: Topology) -> list[tuple[str, list[MixtureSource]]]:
    """(key, sources) of `data.source` and of each stage."""
    source = cfg.data.source
    if source == "embedded":
        size = cfg.data.tokenizer_vocab_size or min(cfg.model.vocab_size, 2048)
        if topology.local_rank == 0:
            embedded_store(cfg.data.cache_dir, size)
        dist.barrier(group=topology.control_group)
        source = str(embedded_store(cfg.data.cache_dir, size))
    first = [MixtureSource(source)] if isinstance(source, str) else source
    later = [(f"data.stages[{number}].source", stage.source) for number, stage in enumerate(cfg.data.stages)]
    return [("data.source", first), *later]


def _open(cfg: Config, topology: Topology, seen: frozenset[Path]) -> Sources:
    """seen: folders of the runs that led here."""
    if is_stream(cfg):
        return Sources([], [], [], [], [], stream=_stream(cfg))
    mixtures = _mixtures(cfg, topology)
    named: dict[Path, tuple[str, MixtureSource]] = {}
    for key, parts in mixtures:
        here: set[Path] = set()
        for number, part in enumerate(parts):
            path, place = Path(part.path).resolve(), f"{key}[{number}]"
            if path in here:
                raise UserError(
                    f"{place}.path={part.path}: is in this mixture twice; give it once, with the weights' sum"
                )
            here.add(path)
            other, before = named.setdefault(path, (place, part))
            for name in ("replay", "max_epochs"):
                if getattr(part, name) != getattr(before, name):
                    raise UserError(
                        f"{place}.{name}={getattr(part, name)}: {part.path} has {getattr(before, name)} in {other}; "
                        "one source keeps one value through all stages"
                    )
    firsts = [part for _, part in named.values()]
    stores = [open_store(part.path) for part in firsts]
    sizes = {path: store.tokens for path, store in zip(named, stores, strict=True)}
    return Sources(
        paths=[Path(part.path) for part in firsts],
        stores=stores,
        mixtures=[_weights(parts, sizes, cfg.data.temperature) for _, parts in mixtures],
        in_file_order=[part.replay for part in firsts],
        max_epochs=[part.max_epochs for part in firsts],
        replay=None if cfg.data.replay_from is None else _replayed(cfg, topology, seen),
    )


def is_stream(cfg: Config) -> bool:
    """Whether the data is tokenised while it is read."""
    return isinstance(cfg.data.source, str) and cfg.data.source.startswith(PREFIX)


def _stream(cfg: Config) -> HubStream:
    data = cfg.data
    assert isinstance(data.source, str) and data.tokenizer is not None
    source = HubSource(
        data.source.removeprefix(PREFIX),
        data.hf_config,
        data.hf_split,
        data.hf_revision,
        data.text_key,
        data.shuffle_buffer,
        cfg.train.seed,
    )
    return HubStream(source, data.tokenizer)


def _weights(parts: list[MixtureSource], sizes: dict[Path, int], temperature: float) -> list[float]:
    """A weight for each store of `sizes` (path: tokens): the configured one, or where null its size^(1/temperature)."""
    own = {Path(part.path).resolve(): part.weight for part in parts}
    by_size = {path: sizes[path] / max(sizes.values()) for path, weight in own.items() if weight is None}
    # Nine digits: another machine's power function must not make another order.
    given = own | {path: float(f"{size ** (1 / temperature):.9g}") for path, size in by_size.items()}
    return [given.get(path) or 0.0 for path in sizes]


def _replayed(cfg: Config, topology: Topology, seen: frozenset[Path]) -> Replayed:
    """The run that `data.replay_from` names. Raises UserError when its data is not there as it was."""
    assert cfg.data.replay_from is not None
    given = Path(cfg.data.replay_from)
    run = given if (given / "config.yaml").is_file() else run_of(given) or given
    try:
        if run.resolve() in seen:
            raise UserError("runs that replay each other have no beginning")
        old = load(run)
        if is_stream(old):
            raise UserError(
                f"it streamed {old.data.source}, which cannot be read again from its first sample beside another "
                f"source; prepare a packed store of it and mix that in with replay: true"
            )
        if old.data.sequence_length != cfg.data.sequence_length:
            raise UserError(
                f"its data.sequence_length={old.data.sequence_length} is not this run's {cfg.data.sequence_length}; "
                f"set data.sequence_length={old.data.sequence_length}"
            )
        sources = _open(old, topology, seen | {run.resolve()})
        found = list_checkpoints(run / "checkpoints")
        checkpoint = find(given) if run != given else found[-1] if found else None
        position, passed = 0, []
        if checkpoint is not None:
            saved = read_state(checkpoint)
            if changed := differing(saved["data"], data_identity(old, sources)):
                raise UserError(f"its data is not what {checkpoint.name} had read ({changed})")
            position, passed = saved["state"]["samples"], saved.get("stage_starts", [])
    except UserError as error:
        raise UserError(f"data.replay_from={cfg.data.replay_from}: {error}") from None
    return Replayed(run, old, sources, starts_of(old, position, passed))


def starts_of(cfg: Config, position: int = 0, passed: Sequence[int] = ()) -> list[int]:
    """The samples at which the stages of a configuration begin; `position` and `passed` as in `stage_starts`."""
    at_tokens = [stage.at_tokens for stage in cfg.data.stages]
    return stage_starts(at_tokens, cfg.data.sequence_length, cfg.train.global_batch_size, position, passed)


def training_batches(cfg: Config, sources: Sources, starts: Sequence[int], first_sample: int = 0) -> TrainBatches:
    """Global batches in the order of a configuration; starts: the samples at which its stages begin.

    Raises UserError for a store that holds less than one sequence, and for a share that is too small.
    """
    replay = None
    if sources.replay is not None:
        old = sources.replay
        replay = (cfg.data.replay or 0.0, training_batches(old.cfg, old.sources, old.starts))
    return TrainBatches(
        sources.stores,
        sources.mixtures[0],
        sequence_length=cfg.data.sequence_length,
        global_batch_size=cfg.train.global_batch_size,
        seed=cfg.train.seed,
        stages=[Stage(*stage) for stage in zip(starts, sources.mixtures[1:], strict=True)],
        in_file_order=sources.in_file_order,
        replay=replay,
        document_mask=cfg.data.document_mask,
        vocab_size=cfg.model.vocab_size,
        first_sample=first_sample,
        packing=cfg.data.packing,
    )


def data_identity(cfg: Config, sources: Sources) -> dict[str, Any]:
    """What the order of samples depends on, in JSON. What a run does not use is left out, limits change no order."""
    if sources.stream is not None:
        return {"stream": sources.stream.identity, "sequence_length": cfg.data.sequence_length}
    identity: dict[str, Any] = {
        "stores": [store.fingerprint for store in sources.stores],
        "weights": sources.mixtures[0] if isinstance(cfg.data.source, list) else [],
        "seed": cfg.train.seed,
        "sequence_length": cfg.data.sequence_length,
    }
    if len(sources.stores) > 1:
        identity |= {"mixture": "earliest date", "names": [store.name for store in sources.stores]}
    if cfg.data.stages:
        later = zip(cfg.data.stages, sources.mixtures[1:], strict=True)
        identity["stages"] = [[stage.at_tokens, weights] for stage, weights in later]
    if cfg.data.packing != "chunk":
        identity["packing"] = cfg.data.packing
    if any(sources.in_file_order):
        identity["in_file_order"] = sources.in_file_order
    if sources.replay is not None:
        old = sources.replay
        of = data_identity(old.cfg, old.sources)
        identity["replay"] = {"share": cfg.data.replay, "of": of, "stage_starts": old.starts}
    return identity


def differing(saved: dict[str, Any], now: dict[str, Any]) -> str:
    """What two data identities differ in, `key: saved -> now`; empty when they are equal."""
    keys = [key for key in {**now, **saved} if saved.get(key) != now.get(key)]
    return ", ".join(f"{key}: {saved.get(key)} -> {now.get(key)}" for key in keys)


def check_epochs(cfg: Config, sources: Sources, batches: TrainBatches, first: int, end: int) -> None:
    """Refuse a run that would read a source more often than its `max_epochs`.

    first: number in the order of the first sample of step 0; end: of the sample after the run's last.
    Raises UserError that says after how many tokens it would happen.
    """
    for source, limit in enumerate(sources.max_epochs):
        samples = batches.samples[source]
        if limit is None or (beyond := first_beyond(batches.order, source, math.floor(limit * samples), end)) is None:
            continue
        steps = max(0, beyond - 1 - first) // cfg.train.global_batch_size
        raise UserError(
            f"max_epochs={limit:g} of {sources.paths[source]}: passed after "
            f"{(beyond - 1) * cfg.data.sequence_length} tokens, in step {steps + 1} of {cfg.total_steps}; the run "
            f"would read it {batches.order.counts(end)[source] / samples:.2f} times. Lower its weight, train for at "
            f"most {steps} steps, or raise max_epochs"
        )


def describe(cfg: Config, sources: Sources, batches: TrainBatches, starts: Sequence[int], end: int) -> list[str]:
    """Lines that say what the mixture does where the configuration alone does not show it; end as in `check_epochs`."""
    names, length = batches.names, cfg.data.sequence_length
    parts = [cfg.data.source if isinstance(cfg.data.source, list) else [], *(s.source for s in cfg.data.stages)]
    lines = []
    for number, (weights, given) in enumerate(zip(sources.mixtures, parts, strict=True)):
        shares = ", ".join(f"{name} {w / sum(weights):.4f}" for name, w in zip(names, weights, strict=False) if w)
        if number:
            start, asked = starts[number - 1], cfg.data.stages[number - 1].at_tokens
            when = f"begins after {start * length} tokens (asked for: {asked})"
            late = ", after the end of this run" if start >= end else ""
            lines.append(f"data.stages[{number - 1}] {when}{late}: {shares}")
        elif given and given[0].weight is None:
            lines.append(f"data.source by size^(1/{cfg.data.temperature:g}): {shares}")
    if sources.replay is not None:
        counts = batches.order.counts(end)
        new = sum(counts[: len(sources.stores)])
        lines.append(
            f"replay: {cfg.data.replay:g} of every batch from {sources.replay.run} in its original order, "
            f"{(end - new) * length} of {end * length} tokens; {new * length} tokens are new"
        )
    return lines
