"""Exact and near duplicates: the first of equals, in the order of the inputs, is kept."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.fingerprint import DIGEST_BYTES, HASHES, SIGNATURE_BYTES, Fingerprints, band_keys, bands_for
from nexa.errors import UserError

KEPT, EXACT, NEAR = 0, 1, 2
"""What becomes of a document."""
MODES = ("exact", "near")
LEFTOVERS = "dedup.*"
"""Pattern of the files that a store holds only until it is finished."""
_REBUILD = 1 << 14  # records read at once when an interrupted run goes on


class KeyTable:
    """uint64 keys with uint32 values in open addressing with linear probing; all methods take arrays.

    12 bytes a slot, 0.35 to 0.7 of the slots used: 17 to 34 bytes a key, 51 for the moment in which it grows.
    """

    FREE = np.uint32(0xFFFFFFFF)
    FULL = 0.7

    def __init__(self) -> None:
        self._count = 0
        self._allocate(1 << 12)

    def _allocate(self, slots: int) -> None:
        self._keys = np.zeros(slots, np.uint64)
        self._values = np.full(slots, self.FREE, np.uint32)
        self._mask = np.uint64(slots - 1)

    def __len__(self) -> int:
        """Number of keys."""
        return self._count

    def get(self, keys: np.ndarray) -> np.ndarray:
        """Value of each key, -1 where there is none; int64, the shape of `keys`."""
        flat = keys.ravel()
        out = np.full(len(flat), -1, np.int64)
        waiting, slots = np.arange(len(flat)), flat & self._mask
        while len(waiting):
            values = self._values[slots]
            hit = (values != self.FREE) & (self._keys[slots] == flat[waiting])
            out[waiting[hit]] = values[hit]
            on = (values != self.FREE) & ~hit
            waiting, slots = waiting[on], (slots[on] + np.uint64(1)) & self._mask
        return out.reshape(keys.shape)

    def put(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Add keys [n]; a key that is there already keeps its value, and of equal new ones the first counts."""
        keys, first = np.unique(keys, return_index=True)
        new = self.get(keys) < 0
        keys, values = keys[new], values[first[new]].astype(np.uint32)
        if self._count + len(keys) > self.FULL * len(self._keys):
            self._grow(self._count + len(keys))
        self._insert(keys, values)
        self._count += len(keys)

    def _grow(self, count: int) -> None:
        used = self._values != self.FREE
        keys, values = self._keys[used], self._values[used]
        slots = len(self._keys)
        while count > self.FULL * slots:
            slots *= 2
        self._allocate(slots)
        self._insert(keys, values)

    def _insert(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Distinct keys that are not in the table."""
        slots = keys & self._mask
        while len(keys):
            free = self._values[slots] == self.FREE
            self._keys[slots[free]] = keys[free]  # of several in one slot the last wins; the others go on
            placed = free & (self._keys[slots] == keys)
            self._values[slots[placed]] = values[placed]
            keys, values, slots = keys[~placed], values[~placed], (slots[~placed] + np.uint64(1)) & self._mask


class Records:
    """A file of records of one size, appended and read by number; what lies behind `count` is cut off."""

    def __init__(self, path: Path, size: int, count: int) -> None:
        """`count`: records an interrupted run had put on the disk. Raises `UserError` when they are not there."""
        self._path, self._size, self.count = path, size, count
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if os.fstat(self._file).st_size < count * size:
            raise UserError(f"{path}: shorter than the interrupted run left it; remove the store and start anew")
        os.ftruncate(self._file, count * size)

    def append(self, record: bytes) -> None:
        """Add a record."""
        if os.pwrite(self._file, record, self.count * self._size) != self._size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        self.count += 1

    def read(self, first: int, count: int = 1) -> bytes:
        """Records [first, first + count)."""
        return os.pread(self._file, count * self._size, first * self._size)

    def flush(self) -> None:
        """Put everything on the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class Deduplicator:
    """Judges documents in the order of the inputs by their fingerprints.

    Exact: the 128-bit BLAKE2b digests of the UTF-8 are equal. Near: moreover, a kept document that shares a band of the
    signature agrees with it in at least `threshold` of the entries. A band remembers the first kept document it
    occurred in. Memory per kept document: about 17 to 34 bytes, and for near duplicates the same again for each band
    (18 at 0.8: 0.3 to 0.6 kB). On disk until the store is finished: 16 bytes, and 512 for near duplicates.
    """

    def __init__(self, directory: Path, threshold: float | None, kept: int = 0) -> None:
        """`threshold`: of near duplicates, None for exact ones alone; `kept`: what `flush` told an interrupted run."""
        self._threshold = threshold
        self._digests = Records(directory / "dedup.digests", DIGEST_BYTES, kept)
        self._by_digest, self._by_band = KeyTable(), KeyTable()
        self._signatures: Records | None = None
        if threshold is not None:
            self._bands = bands_for(threshold)
            self._signatures = Records(directory / "dedup.signatures", SIGNATURE_BYTES, kept)
        for first in range(0, kept, _REBUILD):
            self._rebuild(first, min(_REBUILD, kept - first))

    def _rebuild(self, first: int, count: int) -> None:
        numbers = np.arange(first, first + count)
        digests = np.frombuffer(self._digests.read(first, count), "<u8").reshape(-1, 2)
        self._by_digest.put(digests[:, 0], numbers)
        if self._signatures is not None:
            signatures = np.frombuffer(self._signatures.read(first, count), "<u4").reshape(-1, HASHES)
            keys = band_keys(signatures, *self._bands)
            self._by_band.put(keys.ravel(), np.repeat(numbers, keys.shape[1]))

    def judge(self, documents: Fingerprints) -> np.ndarray:
        """KEPT, EXACT or NEAR for each of the next documents, uint8 [n]."""
        verdicts = np.zeros(len(documents.sizes), np.uint8)
        heads, seen = documents.digests[:, 0], self._by_digest.get(documents.digests[:, 0])
        signatures = np.ascontiguousarray(documents.signatures, "<u4")
        keys = (
            band_keys(signatures, *self._bands) if self._signatures is not None else np.empty((len(seen), 0), np.uint64)
        )
        bands = self._by_band.get(keys)
        fresh: dict[int, int] = {}
        fresh_bands: dict[int, int] = {}
        for row in range(len(verdicts)):
            digest, head = documents.digests[row].tobytes(), int(heads[row])
            equal = fresh.get(head, int(seen[row]))
            if equal >= 0 and self._digests.read(equal) == digest:
                verdicts[row] = EXACT
                continue
            candidates = {number for number in bands[row].tolist() if number >= 0}
            own = keys[row].tolist()
            candidates |= {fresh_bands[key] for key in own if key in fresh_bands}
            if self._signatures is not None:
                if any(self._alike(number, signatures[row]) for number in candidates):
                    verdicts[row] = NEAR
                    continue
                self._signatures.append(signatures[row].tobytes())
            number = self._digests.count
            self._digests.append(digest)
            fresh.setdefault(head, number)
            for key in own:
                fresh_bands.setdefault(key, number)
        for table, found in ((self._by_digest, fresh), (self._by_band, fresh_bands)):
            table.put(np.array(list(found), np.uint64), np.array(list(found.values()), np.int64))
        if self._digests.count >= int(KeyTable.FREE):
            raise UserError(f"--dedup: more than {int(KeyTable.FREE)} documents; prepare the corpus in parts")
        return verdicts

    def _alike(self, number: int, signature: np.ndarray) -> bool:
        assert self._signatures is not None
        assert self._threshold is not None
        other = np.frombuffer(self._signatures.read(number), "<u4")
        return int(np.count_nonzero(other == signature)) >= self._threshold * HASHES

    def flush(self) -> int:
        """Put everything on the disk; returns what a new one needs to go on from here."""
        for records in (self._digests, self._signatures):
            if records is not None:
                records.flush()
        return self._digests.count

    def close(self) -> None:
        """Close the files."""
        for records in (self._digests, self._signatures):
            if records is not None:
                records.close()


def report(verdicts: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
    """Counts of what was removed, and its bytes."""
    return {
        "duplicates": int((verdicts == EXACT).sum()),
        "near_duplicates": int((verdicts == NEAR).sum()),
        "removed_bytes": int(sizes[verdicts != KEPT].sum()),
    }
