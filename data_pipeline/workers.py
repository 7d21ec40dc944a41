"""Parse and tokenise units in parallel processes, results in order, with a bounded number under way."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipeline.fingerprint import Fingerprints, fingerprints
from data_pipeline.indexed import dtype_for
from data_pipeline.sources import Cursor, ReadOptions, Unit, parse_unit
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from nexa.errors import UserError

START = Cursor()
UNDER_WAY = 64 << 20
"""Bytes of text with the worker processes above which no more is handed out."""


@dataclass
class Tokenized:
    """What became of a unit. `splits`: {split: (ids end to end, length of each document)}; sizes in UTF-8 bytes.

    `places`: for each split the numbers of its documents in the unit; `fingerprints`: of all, when asked for.
    """

    splits: dict[str, tuple[np.ndarray, np.ndarray]]
    empty: int
    bad: list[tuple[str, str]]
    text_bytes: int
    number: int = 0
    after: Cursor = START
    consumed: int = 0
    places: dict[str, np.ndarray] = field(default_factory=dict)
    fingerprints: Fingerprints | None = None

    def keep(self, kept: np.ndarray) -> None:
        """Leave out the documents whose entry in `kept` (bool, in the order of the unit) is false."""
        for split, (tokens, lengths) in self.splits.items():
            mask = kept[self.places[split]]
            self.splits[split] = tokens[np.repeat(mask, lengths)], lengths[mask]

    @property
    def documents(self) -> int:
        """Documents of all splits."""
        return sum(len(lengths) for _, lengths in self.splits.values())

    @property
    def tokens(self) -> int:
        """Tokens of all splits."""
        return sum(len(tokens) for tokens, _ in self.splits.values())


def split_of(data: bytes, validation_fraction: float) -> str:
    """Split of a document: a hash of its text decides, so that equal documents never part."""
    draw = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") / 2**64
    return "validation" if draw < validation_fraction else "train"


@dataclass(frozen=True)
class Work:
    """What is done with every unit. `dedup`: fingerprints wanted, `exact` or `near` (with signatures), None for no."""

    read: ReadOptions
    validation_fraction: float
    dedup: str | None = None


class UnitWorker:
    """Turns a unit into tokens."""

    def __init__(self, tokenizer: Tokenizer, work: Work) -> None:
        self._tokenizer, self._work = tokenizer, work
        self._dtype = dtype_for(tokenizer.vocab_size)

    def __call__(self, unit: Unit) -> Tokenized:
        """Parse, split and tokenise."""
        documents = parse_unit(unit, self._work.read)
        places: dict[str, list[int]] = {"train": [], "validation": []}
        for number, data in enumerate(documents.encoded):
            places[split_of(data, self._work.validation_fraction)].append(number)
        result = Tokenized({}, documents.empty, documents.bad, sum(map(len, documents.encoded)))
        for split, numbers in places.items():
            if numbers:
                texts = [documents.texts[number] for number in numbers]
                result.splits[split] = self._tokenizer.encode_documents(texts, self._dtype)
                result.places[split] = np.array(numbers)
        if self._work.dedup:
            result.fingerprints = fingerprints(documents.texts, documents.encoded, self._work.dedup == "near")
        return result


_worker: UnitWorker | None = None


def _start_process(parent: int, tokenizer: str, eod: str, work: Work) -> None:
    """Set up a worker process: its tokenizer, no reaction to Ctrl-C, and an end when the main process is gone."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _worker = UnitWorker(load_tokenizer(tokenizer, eod), work)


def _run(unit: Unit) -> Tokenized:
    assert _worker is not None
    return _worker(unit)


def tokenize_units(
    units: Iterable[tuple[int, Unit]],
    tokenizer: tuple[str, Tokenizer],
    work: Work,
    workers: int,
) -> Generator[Tokenized, None, None]:
    """Results of (source number, unit) pairs, in their order. `tokenizer`: its place on disk, and itself.

    Under way at once are at most 2 `workers` + 1 units and, beyond the newest, UNDER_WAY bytes of text. With one worker
    everything happens in this process. Raises `UserError` when a worker process dies.
    """
    where, loaded = tokenizer
    if workers == 1:
        run = UnitWorker(loaded, work)
        for number, unit in units:
            yield _labelled(run(unit), number, unit)
        return
    arguments: tuple[Any, ...] = (os.getpid(), where, loaded.eod, work)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_process, initargs=arguments)
    waiting: deque[tuple[Future[Tokenized], int, Cursor, int, int]] = deque()
    size = 0
    try:
        for number, unit in units:
            # Before the new unit is handed over, so that huge documents do not pile up.
            while waiting and (len(waiting) > 2 * workers or size > UNDER_WAY):
                size -= waiting[0][-1]
                yield _collect(waiting.popleft())
            waiting.append((pool.submit(_run, unit), number, unit.after, unit.consumed, unit.size))
            size += unit.size
        while waiting:
            yield _collect(waiting.popleft())
    except BrokenProcessPool:
        raise UserError(
            "a worker process of `nexa data prepare` died, perhaps for want of memory; what is finished is kept: run "
            "the same command again, with fewer --workers or a smaller --max-document-mb"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _collect(entry: tuple[Future[Tokenized], int, Cursor, int, int]) -> Tokenized:
    future, number, after, consumed, _ = entry
    result = future.result()
    result.number, result.after, result.consumed = number, after, consumed
    return result


def _labelled(result: Tokenized, number: int, unit: Unit) -> Tokenized:
    result.number, result.after, result.consumed = number, unit.after, unit.consumed
    return result
