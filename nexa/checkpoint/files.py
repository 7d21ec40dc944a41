"""Durable files: written once, hashed on the way, on the disk before the call returns."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 16 << 20
"""Largest piece handed to the operating system at once."""
TMP_SUFFIX = ".tmp"
"""End of the name of every directory that is not, or no longer, a checkpoint."""

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says about one file: its length in bytes and the SHA-256 of its content, in hex."""

    bytes: int
    sha256: str


def write_file(path: Path, chunks: Iterable[Buffer]) -> FileRecord:
    """Write `chunks` one after the other into a new file and force it to the disk.

    Raises OSError (full disk, no permission, file exists); a file cut short by that stays for the caller to remove.
    """
    digest, total = hashlib.sha256(), 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            for low in range(0, len(view), CHUNK_BYTES):
                piece = view[low : low + CHUNK_BYTES]
                write_all(fd, piece)
                digest.update(piece)
            total += len(view)
        os.fsync(fd)
    finally:
        os.close(fd)
    return FileRecord(total, digest.hexdigest())


def write_all(fd: int, piece: memoryview) -> None:
    """`os.write` until nothing is left (a signal or a quota may shorten one call)."""
    while piece:
        piece = piece[os.write(fd, piece) :]


def write_json(path: Path, value: object) -> FileRecord:
    """Write `value` as JSON; the same rules as `write_file`."""
    return write_file(path, [json_bytes(value)])


def json_bytes(value: object) -> bytes:
    """`value` as indented JSON with a final newline; floats keep every bit."""
    return (json.dumps(value, indent=1) + "\n").encode()


def publish_json(path: Path, value: object) -> None:
    """Like `write_json`, but another process sees either no file or the whole one."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    write_json(aside, value)
    os.replace(aside, path)
    fsync_directory(path.parent)


def read_chunks(path: Path) -> Iterator[bytes]:
    """The content of a file in pieces of bounded size."""
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    for chunk in read_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def fsync_directory(path: Path) -> None:
    """Force the names in a directory (creations, renames) to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def discard(path: Path) -> None:
    """Remove a directory so that at no instant a part of it looks whole: rename it aside first, then delete.

    A directory that is already gone is fine; what cannot be deleted keeps a `.tmp` name, for the next clean-up.
    """
    aside = path.with_name(f"{path.name.split('.')[0]}.{secrets.token_hex(6)}.gone{TMP_SUFFIX}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)
