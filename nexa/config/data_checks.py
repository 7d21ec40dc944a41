"""Rules of where tokens come from: sources, stages, replay."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from nexa.config.fields import shorten
from nexa.config.rules import Check, reads
from nexa.config.schema import Config, MixtureSource

DATA_CHECKS: list[Check] = []
STREAM = "hf:"
"""What a `data.source` that is streamed begins with."""
_reads = partial(reads, DATA_CHECKS)


@_reads("data.source")
def _sources(cfg: Config, world_size: int | None) -> Iterator[str]:
    source = cfg.data.source
    if isinstance(source, str):
        if not source.strip():
            yield "data.source='': give `embedded`, a packed store, or a list of {path, weight, replay}"
        elif source != "embedded" and _resembles(source, "embedded") and not Path(source).exists():
            yield f"data.source={source}: did you mean embedded? There is no packed store of that name"
        return
    yield from _mixture("data.source", source)


def _resembles(word: str, other: str) -> bool:
    return difflib.SequenceMatcher(None, word.lower(), other).ratio() > 0.8


def _mixture(key: str, sources: list[MixtureSource]) -> Iterator[str]:
    """What is wrong inside one mixture."""
    if not sources:
        yield f"{key}=[]: a mixture needs at least one {{path, weight, replay}}"
    for index, part in enumerate(sources):
        place = f"{key}[{index}]"
        if not part.path.strip():
            yield f"{place}.path='': give the packed store of this source"
        elif part.path.startswith(STREAM):
            yield (
                f"{place}.path={part.path}: only data.source={part.path} alone is streamed; for a mixture make a "
                f"packed store with nexa data prepare {part.path}"
            )
        if part.weight is not None and part.weight <= 0:
            yield f"{place}.weight={part.weight}: must be greater than 0; leave the source out instead"
        if part.max_epochs is not None and part.max_epochs <= 0:
            yield f"{place}.max_epochs={part.max_epochs}: must be greater than 0, or null for no limit"
    by_size = [part.weight is None for part in sources]
    if any(by_size) and not all(by_size):
        yield (
            f"{key}[{by_size.index(True)}].weight=null: by size, but {key}[{by_size.index(False)}] has a weight of its "
            "own; give all of a mixture a weight, or none"
        )


@_reads("data.stages")
def _stages(cfg: Config, world_size: int | None) -> Iterator[str]:
    before = 0
    for index, stage in enumerate(cfg.data.stages):
        if stage.at_tokens <= before:
            than = f"that of the stage before, {before}" if index else "0, where data.source begins"
            yield f"data.stages[{index}].at_tokens={stage.at_tokens}: must be greater than {than}"
        before = max(before, stage.at_tokens)
        yield from _mixture(f"data.stages[{index}].source", stage.source)


@_reads("data.source", "data.stages", "data.temperature")
def _temperature(cfg: Config, world_size: int | None) -> Iterator[str]:
    first = cfg.data.source if isinstance(cfg.data.source, list) else []
    parts = [*first, *(part for stage in cfg.data.stages for part in stage.source)]
    if cfg.data.temperature != 1 and all(part.weight is not None for part in parts):
        yield (
            f"data.temperature={cfg.data.temperature}: only sources with weight null are weighted by size, and there "
            "are none; set weight: null for the sources of a mixture, or data.temperature=1"
        )


@_reads("data.replay", "data.replay_from", "run.dir")
def _replay(cfg: Config, world_size: int | None) -> Iterator[str]:
    share, origin = cfg.data.replay, cfg.data.replay_from
    if origin is not None and share is None:
        yield f"data.replay=null: says how much of data.replay_from={shorten(origin)} to replay; for example 0.05"
    elif share is not None and (origin is None or not origin.strip()):
        yield (
            f"data.replay_from={shorten(origin)}: data.replay={share} needs the run folder (or checkpoint) whose data "
            "is replayed; a store in its own order is a source with replay: true"
        )
    elif origin is not None and Path(cfg.run.dir).resolve() in (
        Path(origin).resolve(),
        *Path(origin).resolve().parents,
    ):
        yield (
            f"data.replay_from={shorten(origin)}: this run's own folder; give the run replayed, or this one another "
            "run.name"
        )


@_reads("data.source", "data.tokenizer", "data.packing", "data.stages", "data.replay_from")
def _streams(cfg: Config, world_size: int | None) -> Iterator[str]:
    data = cfg.data
    if not isinstance(data.source, str) or not data.source.startswith(STREAM):
        return
    if not data.source.removeprefix(STREAM).strip():
        yield f"data.source={data.source}: give the name of a data set behind hf:, such as hf:allenai/c4"
    if data.tokenizer is None:
        yield (
            f"data.tokenizer=null: data.source={data.source} is tokenised while it is read; give a tokenizer.json, a "
            "directory that holds one, or bytes"
        )
    prepare = f"make a packed store with nexa data prepare {data.source}"
    if data.packing != "chunk":
        yield f"data.packing={data.packing}: data.source={data.source} is packed end to end; set chunk, or {prepare}"
    for key, value in (("stages", data.stages), ("replay_from", data.replay_from)):
        if value:
            yield f"data.{key}={shorten(value)}: not together with the stream data.source={data.source}; {prepare}"


@_reads("data.source", "data.shuffle_buffer", "data.hf_config", "data.hf_revision")
def _only_streams(cfg: Config, world_size: int | None) -> Iterator[str]:
    if isinstance(cfg.data.source, str) and cfg.data.source.startswith(STREAM):
        return
    for key in ("shuffle_buffer", "hf_config", "hf_revision"):
        if value := getattr(cfg.data, key):
            yield f"data.{key}={value}: only data.source=hf:NAME reads it; give such a source, or remove this key"
