"""What a document is recognised by: a digest of its bytes, and a MinHash signature of its words."""

from __future__ import annotations

import hashlib
import re
import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np

from data_pipeline.permutation import derive_key

HASHES = 128
"""Length of a signature; the share of equal entries has a standard error of at most 0.045."""
SHINGLE = 5
"""Words of a shingle."""
DIGEST_BYTES = 16
SIGNATURE_BYTES = 4 * HASHES
FOUND = 0.97
"""Least share of the pairs of exactly the threshold's likeness that the bands must bring together."""
_BLOCK = 512  # shingles hashed at once: the table of 512 x 128 fits a core's cache
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[^\W{_UNSPACED}]+|\w")
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Fingerprints:
    """Of n documents: `digests` uint64 [n, 2], `signatures` uint32 [n, HASHES] (no row unless asked for), `sizes`
    int64 [n] in bytes of UTF-8."""

    digests: np.ndarray
    signatures: np.ndarray
    sizes: np.ndarray


def fingerprints(texts: list[str], encoded: list[bytes], near: bool) -> Fingerprints:
    """Fingerprints of documents, given as text and as its UTF-8; signatures only when `near`."""
    raw = b"".join(hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest() for data in encoded)
    rows = [signature(text) for text in texts] if near else []
    return Fingerprints(
        np.frombuffer(raw, "<u8").reshape(-1, 2),
        np.array(rows, np.uint32).reshape(-1, HASHES),
        np.array([len(data) for data in encoded], np.int64),
    )


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; a sign of a script written without spaces is a word of its own."""
    return _WORD.findall(text.lower())


def signature(text: str) -> np.ndarray:
    """MinHash (Broder 1997) of the set of runs of SHINGLE words, uint32 [HASHES].

    Two signatures agree in an entry with probability |A & B| / |A | B| (Jaccard). A text of fewer words is one
    shingle; one without any word is a shingle by its bytes.
    """
    found = words(text)
    hashed = [zlib.crc32(word.encode()) for word in found] if found else [zlib.crc32(text.encode())]
    values = _mixed(np.array(hashed, np.uint64) * _ODD)
    width = min(SHINGLE, len(values))
    count = len(values) - width + 1
    shingles = np.zeros(count, np.uint64)
    for offset in range(width):
        shingles = shingles * _ODD + values[offset : offset + count]
    shingles = _mixed(shingles)
    factors, terms = _functions()
    least = np.full(HASHES, np.iinfo(np.uint64).max, np.uint64)
    for first in range(0, count, _BLOCK):
        hashes = shingles[first : first + _BLOCK, None] * factors + terms
        np.minimum(least, hashes.min(axis=0), out=least)
    return (least >> np.uint64(32)).astype(np.uint32)


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands, rows of each) that compare pairs of likeness `threshold` with probability of at least FOUND.

    Pairs of likeness s share a band with probability 1 - (1 - s^rows)^bands (Leskovec, Rajaraman, Ullman, Mining of
    Massive Datasets, 3.4); the longest rows leave the fewest other pairs to compare.
    """
    for rows in range(HASHES, 1, -1):
        if 1 - (1 - threshold**rows) ** (HASHES // rows) >= FOUND:
            return HASHES // rows, rows
    return HASHES, 1


def band_keys(signatures: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """One uint64 for each band of each signature, [n, bands]; the band's number enters."""
    parts = signatures[:, : bands * rows].reshape(-1, bands, rows).astype(np.uint64)
    keys = np.broadcast_to(np.arange(1, bands + 1, dtype=np.uint64), parts.shape[:2])
    for row in range(rows):
        keys = _mixed(keys * _ODD + parts[:, :, row])
    return keys


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 without its first addition: every bit depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@cache
def _functions() -> tuple[np.ndarray, np.ndarray]:
    """Odd factors and terms of the hash functions x -> factor x + term (mod 2^64)."""
    factors = [derive_key("minhash factor", number) | 1 for number in range(HASHES)]
    terms = [derive_key("minhash term", number) for number in range(HASHES)]
    return np.array(factors, np.uint64), np.array(terms, np.uint64)
