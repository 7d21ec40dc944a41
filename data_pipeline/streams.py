"""Plain, gzip and zstandard files as one stream of bytes that knows how far it has read and notices damage."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from nexa.errors import UserError

SUFFIXES = (".gz", ".zst")
_ZSTD_INPUT = 1 << 14  # small: what one read can grow to stays bounded


class ByteStream:
    """Decompressed bytes of a file. Raises `UserError` naming the file when it is damaged or ends too early."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._raw: IO[bytes] = open(path, "rb")  # noqa: SIM115 - closed by __exit__
        name = path.lower()
        self._plain = not name.endswith(SUFFIXES)
        self._stream: Any = self._raw
        if name.endswith(".gz"):
            self._stream = gzip.GzipFile(fileobj=self._raw)
        elif name.endswith(".zst"):
            self._stream = _ZstdStream(self._raw)
        self._position = 0

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; empty at the end."""
        try:
            data = bytes(self._stream.read(size))
        except (EOFError, zlib.error, gzip.BadGzipFile, _DamagedError) as error:
            raise UserError(
                f"{self._path}: damaged compressed file after {self._position} bytes of text ({error}); "
                "replace it or leave it out"
            ) from None
        self._position += len(data)
        return data

    def skip(self, count: int) -> None:
        """Go on behind the first `count` bytes; a compressed file is read up to there."""
        if self._plain:
            self._raw.seek(count)
            self._position = count
        while self._position < count and self.read(min(1 << 20, count - self._position)):
            pass
        if self._position < count:
            raise UserError(f"{self._path}: shorter than when it was last read ({self._position} of {count} bytes)")

    def consumed(self) -> int:
        """Bytes of the file itself read so far."""
        return self._raw.tell()

    def __enter__(self) -> ByteStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._raw.close()


class _DamagedError(Exception):
    """A zstandard stream that cannot be read to its end."""


class _ZstdStream:
    """Reads all frames of a zstandard file; the library's own reader takes a truncated file for a complete one."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self._error: type[Exception] = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._raw, self._ready, self._pending = raw, b"", b""

    def read(self, size: int) -> bytes:
        pieces, total = [self._ready], len(self._ready)
        while total < size:
            data = self._pending or self._raw.read(_ZSTD_INPUT)
            self._pending = b""
            if not data:
                if self._frame is not None:
                    raise _DamagedError("the file ends inside a zstandard frame")
                break
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                pieces.append(self._frame.decompress(data))
            except self._error as error:
                raise _DamagedError(str(error)) from None
            total += len(pieces[-1])
            if self._frame.eof:
                self._pending, self._frame = self._frame.unused_data, None
        joined = b"".join(pieces)
        self._ready = joined[size:]
        return joined[:size]


def open_stream(path: str | Path) -> ByteStream:
    """Open a file for reading; `.gz` and `.zst` are decompressed."""
    try:
        return ByteStream(str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
