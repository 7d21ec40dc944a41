"""Write a packed store: splits, shards of a chosen size, and the manifest that makes it complete."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.indexed import ShardWriter
from data_pipeline.store import FORMAT, MANIFEST, VERSION
from data_pipeline.tokenizer import Tokenizer

SPLITS = ("train", "validation")
SHARD_TOKENS = 1_000_000_000


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


class _SplitWriter:
    """The shards of one split; a shard closes at the first document end at or after `shard_tokens`."""

    def __init__(
        self, directory: Path, split: str, dtype: np.dtype[Any], shard_tokens: int, state: dict[str, Any]
    ) -> None:
        self._directory, self._split, self._dtype, self._limit = directory, split, dtype, shard_tokens
        self.finished: list[dict[str, Any]] = list(state.get("finished", []))
        self._open: ShardWriter | None = None
        self._remove_strays(state.get("open"))
        if state.get("open"):
            self._open = self._start(state["open"]["documents"], state["open"]["tokens"])

    def _start(self, documents: int = 0, tokens: int = 0) -> ShardWriter:
        name = f"{self._split}_{len(self.finished):05d}"
        return ShardWriter(self._directory / name, self._dtype, documents, tokens)

    def _remove_strays(self, going_on: dict[str, int] | None) -> None:
        """Remove shards begun after the state was saved."""
        known = len(self.finished) + (1 if going_on else 0)
        for path in self._directory.glob(f"{self._split}_[0-9]*"):
            number = path.name.removeprefix(f"{self._split}_").split(".")[0]
            if number.isdigit() and int(number) >= known:
                path.unlink()

    def append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Add documents, opening a new shard wherever one is full."""
        ends = np.cumsum(lengths)
        document = position = 0
        while document < len(lengths):
            if self._open is None:
                self._open = self._start()
            room = self._limit - self._open.tokens
            last = min(int(np.searchsorted(ends, position + room)) + 1, len(lengths))
            end = int(ends[last - 1])
            self._open.append(tokens[position:end], lengths[document:last])
            document, position = last, end
            if self._open.tokens >= self._limit:
                self.close()

    def close(self) -> None:
        """Finish the open shard, if any."""
        if self._open is not None:
            self.finished.append(self._open.close())
            self._open = None

    def state(self) -> dict[str, Any]:
        """Everything so far, put on the disk, as a value to go on from."""
        going_on = None
        if self._open is not None:
            self._open.flush()
            going_on = {"documents": self._open.documents, "tokens": self._open.tokens}
        return {"finished": self.finished, "open": going_on}

    def abandon(self) -> None:
        """Close files without finishing."""
        if self._open is not None:
            self._open.abandon()


class StoreWriter:
    """Writes the splits of a store; `state` is what an interrupted writer's `state()` returned."""

    def __init__(
        self,
        directory: Path,
        dtype: np.dtype[Any],
        shard_tokens: int = SHARD_TOKENS,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._directory = directory
        self._splits = {
            split: _SplitWriter(directory, split, dtype, shard_tokens, (state or {}).get(split, {})) for split in SPLITS
        }
        self._dtype = dtype

    def append(self, split: str, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Add documents to a split: tokens end to end and the length of each."""
        self._splits[split].append(tokens, lengths)

    def state(self) -> dict[str, Any]:
        """Put everything on the disk; returns what a new writer needs to go on from here."""
        return {split: writer.state() for split, writer in self._splits.items()}

    def abandon(self) -> None:
        """Close all files without finishing the store."""
        for writer in self._splits.values():
            writer.abandon()

    def finish(self, tokenizer: Tokenizer, extra: dict[str, Any]) -> dict[str, Any]:
        """Close all shards and write the manifest, last; returns it. `extra`: more keys for it."""
        splits: dict[str, Any] = {}
        for split, writer in self._splits.items():
            writer.close()
            splits[split] = {
                "documents": sum(shard["documents"] for shard in writer.finished),
                "tokens": sum(shard["tokens"] for shard in writer.finished),
                "shards": writer.finished,
            }
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self._dtype.name,
            "tokenizer": describe_tokenizer(tokenizer),
            "splits": splits,
            **extra,
        }
        write_json(self._directory / MANIFEST, manifest)
        for leftover in self._directory.glob("*.lengths"):
            leftover.unlink()
        return manifest


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer's entry in a manifest."""
    return {
        "kind": tokenizer.kind,
        "file": "tokenizer.json" if tokenizer.kind == "huggingface" else None,
        "sha256": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "eod_id": tokenizer.eod_id,
    }
