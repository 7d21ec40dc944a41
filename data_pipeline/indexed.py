"""One shard of tokens on disk: Megatron's `.bin`/`.idx` pair (MMIDIDX version 1), mapped to read, streamed to write.

Layout of `.idx` (little endian): magic `MMIDIDX\\0\\0`, version uint64 = 1, dtype code uint8, number of sequences S
uint64, length of the document table D uint64, then int32[S] sequence lengths in tokens, int64[S] byte offsets into
`.bin`, int64[D] first sequence of each document with S as last entry. Source: Megatron-LM
`megatron/core/datasets/indexed_dataset.py`; importing that module costs seconds, reading the format does not.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nexa.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
_INT64 = struct.Struct("<q")
DTYPE_CODES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
CHUNK = 1 << 20
UINT16_VOCABULARY = 65500
"""Vocabularies below this size are stored as uint16, as Megatron does."""


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """Smallest token type that Megatron would choose for a vocabulary."""
    return DTYPE_CODES[8] if vocab_size < UINT16_VOCABULARY else DTYPE_CODES[4]


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def shard_paths(prefix: Path) -> tuple[Path, Path]:
    """(`prefix.bin`, `prefix.idx`); the prefix may itself contain dots."""
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


class ShardReader:
    """Tokens and document boundaries of one `.bin`/`.idx` pair; opening costs neither time nor memory in documents.

    Attributes: `tokens`, `documents` (counts), `dtype` of the file. Raises `UserError` for a missing, damaged or
    truncated file, naming it.
    """

    def __init__(self, prefix: Path) -> None:
        self.bin_path, self.idx_path = shard_paths(prefix)
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise UserError(f"{path}: file not found; a packed store needs both {prefix.name}.bin and .idx")
        self._read_header()
        self._check_table()
        self._check_tokens()

    def _read_header(self) -> None:
        size = self.idx_path.stat().st_size
        if size < HEADER.size:
            raise UserError(
                f"{self.idx_path}: {size} bytes, too short for a Megatron index (truncated or not an index)"
            )
        with open(self.idx_path, "rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        magic, version, code, self._sequences, table = HEADER.unpack_from(self._map, 0)
        if magic != MAGIC:
            raise UserError(f"{self.idx_path}: not a Megatron index: begins with {magic!r}, expected {MAGIC!r}")
        if version != 1:
            raise UserError(f"{self.idx_path}: index version {version}, only version 1 can be read")
        if code not in DTYPE_CODES:
            raise UserError(f"{self.idx_path}: token type code {code} is no integer type; known: {sorted(DTYPE_CODES)}")
        self.dtype = DTYPE_CODES[code]
        self.documents = max(0, table - 1)
        self._offsets_at = HEADER.size + 4 * self._sequences
        self._table_at = self._offsets_at + 8 * self._sequences
        expected = self._table_at + 8 * table
        if size not in (expected, expected + self._sequences):  # one mode byte per sequence in multimodal stores
            raise UserError(f"{self.idx_path}: {size} bytes, but its header asks for {expected}: truncated or damaged")

    def _check_table(self) -> None:
        ends = (self._table(0), self._table(self.documents)) if self.documents else (0, self._sequences)
        if ends != (0, self._sequences):
            raise UserError(
                f"{self.idx_path}: the document table runs from {ends[0]} to {ends[1]}, expected 0 to {self._sequences}"
            )

    def _check_tokens(self) -> None:
        self.tokens = 0
        if self._sequences:
            last = self._sequences - 1
            length = int(np.frombuffer(self._map, "<i4", 1, HEADER.size + 4 * last)[0])
            self.tokens = self._offset(last) // self.dtype.itemsize + length
        size, expected = self.bin_path.stat().st_size, self.tokens * self.dtype.itemsize
        if size != expected:
            kind = "truncated" if size < expected else "longer than its index says"
            raise UserError(f"{self.bin_path}: {kind}: {size} bytes, but {self.idx_path.name} describes {expected}")
        self._data = np.memmap(self.bin_path, self.dtype, "r") if self.tokens else np.empty(0, self.dtype)

    def _offset(self, sequence: int) -> int:
        return int(_INT64.unpack_from(self._map, self._offsets_at + 8 * sequence)[0])

    def _table(self, document: int) -> int:
        return int(_INT64.unpack_from(self._map, self._table_at + 8 * document)[0])

    def document_start(self, document: int) -> int:
        """Token position at which a document begins."""
        sequence = self._table(document)
        return self.tokens if sequence >= self._sequences else self._offset(sequence) // self.dtype.itemsize

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from `start`, in the file's own type (a view of the map)."""
        return self._data[start : start + count]

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Sorted token positions in [start, stop) at which a document begins (int64); O(log documents)."""
        # The tables are not aligned in the file, so numpy's searchsorted would copy them whole.
        documents = range(self.documents)
        first = bisect_left(documents, start, key=self.document_start)
        last = bisect_left(documents, min(stop, self.tokens), lo=first, key=self.document_start)
        if first == last:
            return np.empty(0, np.int64)
        return np.unique(self.positions(first, last))  # empty documents share a start

    def positions(self, first: int, last: int) -> np.ndarray:
        """Token positions at which the documents [first, last) begin, int64; number `documents` stands for the end.

        Raises `UserError` when the document table is out of order there.
        """
        sequences = np.frombuffer(self._map, "<i8", last - first, self._table_at + 8 * first)
        if int(sequences[0]) < 0 or int(sequences[-1]) > self._sequences or (np.diff(sequences) < 0).any():
            raise UserError(f"{self.idx_path}: the document table is not in order; the index is damaged")
        base, top = int(sequences[0]), min(int(sequences[-1]) + 1, self._sequences)
        offsets = np.frombuffer(self._map, "<i8", top - base, self._offsets_at + 8 * base) // self.dtype.itemsize
        return np.append(offsets, self.tokens)[sequences - base]

    def check(self) -> None:
        """Read the whole index in pieces. Raises `UserError` when its tables disagree with each other."""
        end = 0
        for first in range(0, self._sequences, CHUNK):
            count = min(CHUNK, self._sequences - first)
            lengths = np.frombuffer(self._map, "<i4", count, HEADER.size + 4 * first).astype(np.int64)
            offsets = np.frombuffer(self._map, "<i8", count, self._offsets_at + 8 * first)
            ends = end + np.cumsum(lengths) * self.dtype.itemsize
            wrong = (lengths < 0) | (offsets != ends - lengths * self.dtype.itemsize)
            if wrong.any():
                raise UserError(
                    f"{self.idx_path}: sequence {first + int(wrong.argmax())} does not begin where the one before it "
                    "ends; the index is damaged"
                )
            end = int(ends[-1])
        for first in range(0, self.documents, CHUNK):
            self.positions(first, min(first + CHUNK, self.documents) + 1)


class ShardWriter:
    """Writes one shard document by document in constant memory; can go on after a kill from (`documents`, `tokens`).

    Lengths go to `<prefix>.lengths` until `close` turns them into the index.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any], documents: int = 0, tokens: int = 0) -> None:
        self.name = prefix.name
        self.bin_path, self.idx_path = shard_paths(prefix)
        self.lengths_path = prefix.with_name(prefix.name + ".lengths")
        self.dtype, self.documents, self.tokens = dtype, documents, tokens
        self._bin = _open_at(self.bin_path, tokens * dtype.itemsize)
        self._lengths = _open_at(self.lengths_path, documents * 4)

    def append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Add documents: their tokens end to end, and the length of each."""
        assert int(lengths.sum()) == len(tokens)
        self._bin.write(np.ascontiguousarray(tokens, self.dtype).data)
        self._lengths.write(np.ascontiguousarray(lengths, "<i4").data)
        self.documents += len(lengths)
        self.tokens += len(tokens)

    def flush(self) -> None:
        """Put everything appended so far on the disk."""
        for stream in (self._bin, self._lengths):
            stream.flush()
            os.fsync(stream.fileno())

    def close(self) -> dict[str, Any]:
        """Write the index; returns the shard's manifest entry (name, counts, sizes, SHA-256).

        `<prefix>.lengths` stays: the caller removes it once it no longer needs to resume this shard.
        """
        self.flush()
        self._bin.close()
        self._lengths.close()
        partial = self.idx_path.with_name(self.idx_path.name + ".partial")
        with open(partial, "wb") as out:
            code = next(code for code, dtype in DTYPE_CODES.items() if dtype == self.dtype)
            out.write(HEADER.pack(MAGIC, 1, code, self.documents, self.documents + 1))
            for lengths in self._length_blocks():
                out.write(lengths.data)
            position = 0
            for lengths in self._length_blocks():
                ends = position + np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
                out.write(np.concatenate([[position], ends[:-1]]).astype("<i8").data)
                position = int(ends[-1])
            for first in range(0, self.documents + 1, CHUNK):
                out.write(np.arange(first, min(first + CHUNK, self.documents + 1), dtype="<i8").data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, self.idx_path)
        return {
            "name": self.name,
            "documents": self.documents,
            "tokens": self.tokens,
            "bin_bytes": self.bin_path.stat().st_size,
            "idx_bytes": self.idx_path.stat().st_size,
            "bin_sha256": sha256_file(self.bin_path),
            "idx_sha256": sha256_file(self.idx_path),
        }

    def abandon(self) -> None:
        """Close the files without an index (the run is interrupted and will go on later)."""
        self._bin.close()
        self._lengths.close()

    def _length_blocks(self) -> Iterator[np.ndarray]:
        with open(self.lengths_path, "rb") as stream:
            while block := stream.read(4 * CHUNK):
                yield np.frombuffer(block, "<i4")


def _open_at(path: Path, size: int) -> Any:
    """Open for writing at `size` bytes, cutting off what an interrupted run wrote behind it."""
    if size == 0:
        return open(path, "wb")
    found = path.stat().st_size if path.is_file() else 0
    if found < size:
        raise UserError(
            f"{path}: {found} bytes, but the interrupted run had written {size}; remove the store, start anew"
        )
    stream = open(path, "r+b")  # noqa: SIM115 - closed by the writer
    stream.truncate(size)
    stream.seek(size)
    return stream
