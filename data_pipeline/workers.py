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
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.indexed import dtype_for
from data_pipeline.sources import Cursor, ReadOptions, Unit, parse_unit
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from nexa.errors import UserError

START = Cursor()


@dataclass
class Tokenized:
    """What became of a unit. `splits`: {split: (ids end to end, length of each document)}; sizes in UTF-8 bytes."""

    splits: dict[str, tuple[np.ndarray, np.ndarray]]
    empty: int
    bad: list[tuple[str, str]]
    text_bytes: int
    number: int = 0
    after: Cursor = START
    consumed: int = 0

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


class UnitWorker:
    """Turns a unit into tokens."""

    def __init__(self, tokenizer: Tokenizer, options: ReadOptions, validation_fraction: float) -> None:
        self._tokenizer, self._options, self._fraction = tokenizer, options, validation_fraction
        self._dtype = dtype_for(tokenizer.vocab_size)

    def __call__(self, unit: Unit) -> Tokenized:
        """Parse, split and tokenise."""
        documents = parse_unit(unit, self._options)
        texts: dict[str, list[str]] = {"train": [], "validation": []}
        for text, data in zip(documents.texts, documents.encoded, strict=True):
            texts[split_of(data, self._fraction)].append(text)
        size = sum(map(len, documents.encoded))
        splits = {split: self._tokenizer.encode_documents(part, self._dtype) for split, part in texts.items() if part}
        return Tokenized(splits, documents.empty, documents.bad, size)


_worker: UnitWorker | None = None


def _start_process(parent: int, tokenizer: str, eod: str, options: ReadOptions, validation_fraction: float) -> None:
    """Set up a worker process: its tokenizer, no reaction to Ctrl-C, and an end when the main process is gone."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _worker = UnitWorker(load_tokenizer(tokenizer, eod), options, validation_fraction)


def _run(unit: Unit) -> Tokenized:
    assert _worker is not None
    return _worker(unit)


def tokenize_units(
    units: Iterable[tuple[int, Unit]],
    tokenizer: tuple[str, Tokenizer],
    options: ReadOptions,
    validation_fraction: float,
    workers: int,
) -> Generator[Tokenized, None, None]:
    """Results of (source number, unit) pairs, in their order. `tokenizer`: its place on disk, and itself.

    With one worker everything happens in this process. Raises `UserError` when a worker process dies.
    """
    where, loaded = tokenizer
    if workers == 1:
        run = UnitWorker(loaded, options, validation_fraction)
        for number, unit in units:
            yield _labelled(run(unit), number, unit)
        return
    arguments: tuple[Any, ...] = (os.getpid(), where, loaded.eod, options, validation_fraction)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_process, initargs=arguments)
    waiting: deque[tuple[Future[Tokenized], int, Cursor, int]] = deque()
    try:
        for number, unit in units:
            waiting.append((pool.submit(_run, unit), number, unit.after, unit.consumed))
            if len(waiting) > 2 * workers:
                yield _collect(waiting.popleft())
        while waiting:
            yield _collect(waiting.popleft())
    except BrokenProcessPool:
        raise UserError(
            "a worker process of `nexa data prepare` died, perhaps for want of memory; what is finished is kept: run "
            "the same command again, with fewer --workers or a smaller --max-document-mb"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _collect(entry: tuple[Future[Tokenized], int, Cursor, int]) -> Tokenized:
    future, number, after, consumed = entry
    result = future.result()
    result.number, result.after, result.consumed = number, after, consumed
    return result


def _labelled(result: Tokenized, number: int, unit: Unit) -> Tokenized:
    result.number, result.after, result.consumed = number, unit.after, unit.consumed
    return result
