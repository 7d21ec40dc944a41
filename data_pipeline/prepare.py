"""Corpus to packed store: parallel, in bounded memory, and able to go on after a kill with the same result."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import IO, Any

from data_pipeline.dedup import KEPT, LEFTOVERS, MODES, Deduplicator, report
from data_pipeline.indexed import dtype_for
from data_pipeline.progress import Progress
from data_pipeline.sources import Cursor, ReadOptions, Source, Unit, find_sources, parse_unit, read_units
from data_pipeline.store import MANIFEST, PROGRESS, read_manifest
from data_pipeline.tokenizer import MIN_BPE_VOCABULARY, Tokenizer, load_tokenizer, train_bpe
from data_pipeline.workers import Tokenized, Work, tokenize_units
from data_pipeline.writer import SHARD_TOKENS, StoreWriter, write_json
from nexa.errors import UserError

BAD_DOCUMENTS = "bad_documents.jsonl"
LOCK = ".lock"
REPORTED = 20
"""Inputs whose figures are printed at the end; the manifest has all."""


@dataclass(frozen=True)
class PrepareOptions:
    """What decides the content of the store (with the inputs): an interrupted run goes on only with the same."""

    read: ReadOptions = field(default_factory=ReadOptions)
    tokenizer: str | None = None
    train_bpe: int | None = None
    bpe_sample_mb: int = 32
    eod: str | None = None
    validation_fraction: float = 0.01
    shard_tokens: int = SHARD_TOKENS
    dedup: str | None = None
    near_threshold: float = 0.8

    def recipe(self) -> dict[str, Any]:
        """What an interrupted run must have in common with the one that goes on; the tokenizer is told apart."""
        left_out = {"tokenizer", "read", *(["dedup"] if self.dedup is None else [])}
        left_out |= {"near_threshold"} if self.dedup != "near" else set()
        return {key: value for key, value in asdict(self).items() if key not in left_out} | asdict(self.read)

    def check(self) -> None:
        """Raise `UserError` naming the option."""
        if (self.tokenizer is None) == (self.train_bpe is None):
            raise UserError("--tokenizer: give either a tokenizer or --train-bpe SIZE, not both and not neither")
        if self.train_bpe is not None and self.train_bpe < MIN_BPE_VOCABULARY:
            raise UserError(f"--train-bpe: {self.train_bpe}; needs at least {MIN_BPE_VOCABULARY} (256 bytes + 1)")
        if not (math.isfinite(self.validation_fraction) and 0 <= self.validation_fraction < 1):
            raise UserError(f"--validation-fraction: {self.validation_fraction}; must be from 0 to below 1")
        if self.shard_tokens < 1:
            raise UserError(f"--shard-tokens: {self.shard_tokens}; must be at least 1")
        if self.read.max_document_bytes < 1:
            raise UserError("--max-document-mb: must be larger than 0")
        if self.read.text_documents not in ("file", "line"):
            raise UserError(f"--text-documents: {self.read.text_documents!r}; must be file or line")
        if self.dedup is not None and self.dedup not in MODES:
            raise UserError(f"--dedup: {self.dedup!r}; must be {' or '.join(MODES)}")
        if not 0 < self.near_threshold <= 1:
            raise UserError(f"--near-threshold: {self.near_threshold}; must be above 0 and at most 1")


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    options: PrepareOptions,
    *,
    workers: int | None = None,
    checkpoint_seconds: float = 10.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenise inputs (see `find_sources`) into the packed store `out`; returns its manifest.

    Documents keep the order of the inputs; each ends with the tokenizer's end-of-document token; a hash of its text
    puts it into `train` or `validation`. With `dedup`, the first of equal documents is kept, over all inputs and both
    splits (`near`: of documents at least as like as `near_threshold`, too). The result does not depend on `workers`
    (None: one per usable core), nor on how often the run was killed: the same call goes on where it was saved last
    (every `checkpoint_seconds`). What cannot be read is skipped, counted, and listed in `bad_documents.jsonl` with its
    place and the reason.

    Raises `UserError` for bad input or options, when `out` holds something else, and when the disk is full.
    """
    options.check()
    if workers is not None and workers < 1:
        raise UserError(f"--workers: {workers}; must be at least 1")
    workers = workers or len(os.sched_getaffinity(0))
    out = Path(out).expanduser()
    try:
        sources = find_sources(inputs, options.read)
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            return _Run(sources, out, options, progress or Progress()).run(workers, checkpoint_seconds)
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: {error.strerror or error}; what is finished is kept: mend this and run the "
            "same command again"
        ) from None


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep a second process from writing the same store; the lock dies with its process."""
    with open(out / LOCK, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{out}: another process is preparing this store; wait for it or choose another --out"
            ) from None
        yield


class _Run:
    """One call of `prepare`."""

    def __init__(self, sources: list[Source], out: Path, options: PrepareOptions, progress: Progress) -> None:
        self._sources, self._out, self._options, self._progress = sources, out, options, progress
        keys = ("documents", "empty", "bad", "duplicates", "near_duplicates", "text_bytes", "removed_bytes", "tokens")
        self._counts = [dict.fromkeys(keys, 0) for _ in sources]
        self._dedup: Deduplicator | None = None
        self._number, self._cursor, self._between = 0, Cursor(), True
        self._total = max(1, sum(source.size for source in sources))

    def _recipe(self, tokenizer_hash: str) -> dict[str, Any]:
        return {
            "inputs": [source.identity for source in self._sources],
            "tokenizer": tokenizer_hash if self._options.tokenizer else "trained",
            **self._options.recipe(),
        }

    def run(self, workers: int, checkpoint_seconds: float) -> dict[str, Any]:
        """Go through states: already finished, interrupted, new."""
        given = load_tokenizer(self._options.tokenizer, self._options.eod) if self._options.tokenizer else None
        recipe = self._recipe(given.hash if given else "")
        if (self._out / MANIFEST).is_file():
            return self._finished(recipe)
        state = self._saved_state(recipe)
        tokenizer = self._tokenizer(given, state, recipe)
        self._restore(state)
        with open(self._out / BAD_DOCUMENTS, "r+b" if state.get("bad_bytes") else "wb") as bad:
            bad.seek(state.get("bad_bytes", 0))
            bad.truncate()
            dtype = dtype_for(tokenizer.vocab_size)
            if self._options.dedup:
                threshold = self._options.near_threshold if self._options.dedup == "near" else None
                self._dedup = Deduplicator(self._out, threshold, state.get("dedup", 0))
            writer = StoreWriter(self._out, dtype, self._options.shard_tokens, state.get("writer"))
            try:
                self._work(writer, bad, tokenizer, recipe, workers, checkpoint_seconds)
            except BaseException:
                writer.abandon()
                raise
            finally:
                if self._dedup:
                    self._dedup.close()
        return self._finish(writer, tokenizer, recipe)

    def _finished(self, recipe: dict[str, Any]) -> dict[str, Any]:
        manifest = read_manifest(self._out)
        if manifest.get("recipe") != recipe:
            changed = _differences(manifest.get("recipe") or {}, recipe)
            raise UserError(
                f"{self._out}: holds a finished store of other {changed}; choose another --out or remove it"
            )
        self._clean()
        self._progress.note(f"{self._out} is already finished")
        return manifest

    def _saved_state(self, recipe: dict[str, Any]) -> dict[str, Any]:
        file = self._out / PROGRESS
        if not file.is_file():
            strangers = sorted(path.name for path in self._out.iterdir() if path.name != LOCK)
            if strangers:
                raise UserError(f"{self._out}: not empty and no store (it has {strangers[0]}); choose another --out")
            return {}
        try:
            state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{file}: damaged; remove {self._out} and start anew") from None
        if "writer" not in state:  # nothing but perhaps a tokenizer: no loss in another recipe
            return state if state.get("recipe") == recipe else {}
        if state["recipe"] != recipe:
            changed = _differences(state["recipe"], recipe)
            raise UserError(
                f"{self._out}: holds an unfinished store of other {changed}; go on with the old command, choose "
                "another --out, or remove it"
            )
        return state

    def _tokenizer(self, given: Tokenizer | None, state: dict[str, Any], recipe: dict[str, Any]) -> Tokenizer:
        if given is None and state.get("tokenizer"):
            given = load_tokenizer(self._out / "tokenizer.json")
            if given.hash != state["tokenizer"]:
                raise UserError(f"{self._out / 'tokenizer.json'}: changed since the interrupted run; start anew")
            return given
        if given is None:
            assert self._options.train_bpe is not None
            write_json(self._out / PROGRESS, {"recipe": recipe})
            self._progress.note(f"training a BPE of {self._options.train_bpe} tokens")
            given = train_bpe(self._sample(), self._options.train_bpe)
        if not state.get("tokenizer"):
            write_json(self._out / PROGRESS, {"recipe": recipe})
            given.save(self._out)
            write_json(self._out / PROGRESS, {"recipe": recipe, "tokenizer": given.hash})
        return given

    def _sample(self) -> Iterator[str]:
        """Texts for the BPE: an equal share from the beginning of every input."""
        budget = self._options.bpe_sample_mb << 20
        for number, source in enumerate(self._sources):
            share = budget // (len(self._sources) - number)
            for unit in read_units(source, self._options.read, Cursor()):
                documents = parse_unit(unit, self._options.read)
                yield from documents.texts
                size = sum(map(len, documents.encoded))
                budget, share = budget - size, share - size
                if share <= 0:
                    break

    def _restore(self, state: dict[str, Any]) -> None:
        if "writer" not in state:
            return
        self._number, self._cursor = state["source"], Cursor(*state["cursor"])
        self._counts = [zeros | counts for zeros, counts in zip(self._counts, state["counts"], strict=True)]
        share = state["share"]
        self._progress.restart(share)
        self._progress.note(f"going on at {100 * share:.1f} %, {self._sources[self._number].path}")

    def _units(self) -> Iterator[tuple[int, Unit]]:
        cursor = self._cursor
        for number in range(self._number, len(self._sources)):
            for unit in read_units(self._sources[number], self._options.read, cursor):
                yield number, unit
            cursor = Cursor()

    def _work(
        self,
        writer: StoreWriter,
        bad: IO[bytes],
        tokenizer: Tokenizer,
        recipe: dict[str, Any],
        workers: int,
        every: float,
    ) -> None:
        """Write results in order; save the state now and then, and when interrupted."""
        where = "bytes" if tokenizer.kind == "bytes" else str(self._out / "tokenizer.json")
        before = [sum(source.size for source in self._sources[:number]) for number in range(len(self._sources))]
        options = self._options
        saved, share = monotonic(), 0.0
        self._progress.note(f"{len(self._sources)} inputs, {self._total / 1e6:,.1f} MB on disk, {workers} workers")

        def save() -> None:
            bad.flush()
            state: dict[str, Any] = {
                "recipe": recipe,
                "tokenizer": tokenizer.hash,
                "writer": writer.state(),
                "counts": self._counts,
            }
            if self._dedup:
                state["dedup"] = self._dedup.flush()
            place = {"source": self._number, "cursor": [self._cursor.offset, self._cursor.line], "share": share}
            write_json(self._out / PROGRESS, {**state, **place, "bad_bytes": bad.tell()})

        work = Work(options.read, options.validation_fraction, options.dedup)
        results = tokenize_units(self._units(), (where, tokenizer), work, workers)
        try:
            with closing(results):
                for result in results:
                    self._take(result, writer, bad)
                    share = (before[result.number] + result.consumed) / self._total
                    self._progress.update(share)
                    if monotonic() - saved >= every:
                        save()
                        saved = monotonic()
        except KeyboardInterrupt:
            if self._between:  # half a unit on the disk must not count; without saving it is cut off again
                save()
            self._progress.note("interrupted; the same command goes on from here")
            raise

    def _take(self, result: Tokenized, writer: StoreWriter, bad: IO[bytes]) -> None:
        self._between = False
        self._progress.bytes += result.text_bytes
        self._progress.tokens += result.tokens
        removed = {}
        if self._dedup and result.fingerprints:
            verdicts = self._dedup.judge(result.fingerprints)
            removed = report(verdicts, result.fingerprints.sizes)
            result.keep(verdicts == KEPT)
            result.text_bytes -= removed["removed_bytes"]
        for split, (tokens, lengths) in result.splits.items():
            writer.append(split, tokens, lengths)
        for place, reason in result.bad:
            bad.write(json.dumps({"place": place, "reason": reason}, ensure_ascii=False).encode() + b"\n")
        self._number, self._cursor = result.number, result.after
        news = {
            "documents": result.documents,
            "empty": result.empty,
            "bad": len(result.bad),
            "text_bytes": result.text_bytes,
            "tokens": result.tokens,
            **removed,
        }
        for key, value in news.items():
            self._counts[result.number][key] += value
        self._progress.documents += result.documents
        self._progress.bad += len(result.bad)
        self._between = True

    def _finish(self, writer: StoreWriter, tokenizer: Tokenizer, recipe: dict[str, Any]) -> dict[str, Any]:
        totals = {key: sum(counts[key] for counts in self._counts) for key in self._counts[0]}
        if not totals["documents"]:
            first = (self._out / BAD_DOCUMENTS).read_text(encoding="utf-8").partition("\n")[0]
            example = json.loads(first) if first else {"place": self._sources[0].path, "reason": "no text at all"}
            writer.abandon()
            for name in (PROGRESS, BAD_DOCUMENTS, "tokenizer.json", "tokenizer_config.json", LEFTOVERS):
                for path in self._out.glob(name):
                    path.unlink()
            raise UserError(
                f"no document in {len(self._sources)} inputs ({totals['bad']} bad, {totals['empty']} empty); "
                f"the first problem: {example['place']}: {example['reason']}"
            )
        described = [
            {"path": source.path, "kind": source.kind, "size": source.size, **counts}
            for source, counts in zip(self._sources, self._counts, strict=True)
        ]
        manifest = writer.finish(tokenizer, {**totals, "sources": described, "recipe": recipe})
        self._clean()
        self._summary(manifest)
        return manifest

    def _clean(self) -> None:
        for pattern in (PROGRESS, "*.lengths", "*.partial", LEFTOVERS):
            for leftover in self._out.glob(pattern):
                leftover.unlink(missing_ok=True)
        report = self._out / BAD_DOCUMENTS
        if report.is_file() and not report.stat().st_size:
            report.unlink()

    def _summary(self, manifest: dict[str, Any]) -> None:
        splits = manifest["splits"]
        parts = ", ".join(f"{name} {s['documents']:,} documents {s['tokens']:,} tokens" for name, s in splits.items())
        for source in manifest["sources"][:REPORTED]:
            self._progress.note(describe_source(source))
        if len(manifest["sources"]) > REPORTED:
            self._progress.note(f"and {len(manifest['sources']) - REPORTED} more inputs, see {self._out / MANIFEST}")
        self._progress.note(f"finished {self._out}: {parts}; {self._progress.rates()}")
        if manifest["bad"]:
            where = self._out / BAD_DOCUMENTS
            self._progress.note(f"{manifest['bad']} bad documents were skipped; places and reasons: {where}")
        if not splits["validation"]["tokens"] and self._options.validation_fraction:
            self._progress.note(
                "no document fell into the validation split; give more documents (--text-documents line?) or a larger "
                "--validation-fraction"
            )


def describe_source(counts: dict[str, Any]) -> str:
    """One line of an input's entry in the manifest: documents read, kept and removed and why, bytes, tokens."""
    removed = {"empty": "empty", "bad": "bad", "duplicates": "duplicates", "near_duplicates": "near-duplicates"}
    left_out = {name: counts.get(key, 0) for key, name in removed.items()}
    reasons = ", ".join(f"{count:,} {name}" for name, count in left_out.items() if count)
    given = counts["documents"] + sum(left_out.values())
    return (
        f"{counts['path']}: {given:,} documents, {counts['documents']:,} kept, "
        f"{sum(left_out.values()):,} removed{f' ({reasons})' if reasons else ''}, {counts['text_bytes']:,} bytes, "
        f"{counts['tokens']:,} tokens"
    )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    return ", ".join(key.replace("_", " ") for key in keys) or "settings"
