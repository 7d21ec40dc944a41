"""The safetensors format, written as a stream and read by element range.

A file is 8 bytes of header length (little endian), a JSON header {name: {dtype, shape, data_offsets}}, and the
tensors' bytes, row-major, little endian, without holes (https://github.com/huggingface/safetensors).
The library reads and writes whole tensors; a rank of a sharded run wants a few elements of one and a hash of a file it
could not hold in memory, which is why the format is handled here. Files are readable by the library and vice versa.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from nexa.checkpoint.files import CHUNK_BYTES, Buffer, FileRecord, write_file
from nexa.errors import UserError

DTYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
"""Names of the element types in a header."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: `begin` is the absolute byte at which its data starts."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous 1-D tensor as uint8, without a copy."""
    return tensor.view(torch.uint8)


def write_tensors(
    path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.Tensor]], metadata: Mapping[str, str]
) -> FileRecord:
    """Write {name: (shape, flat CPU tensor)} in bounded memory; the file is on the disk and hashed on return.

    Raises OSError like `write_file`.
    """
    # Wide types first keep every tensor aligned to its own element size.
    order = sorted(tensors, key=lambda name: (-tensors[name][1].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        shape, data = tensors[name]
        assert data.dim() == 1 and data.numel() == math.prod(shape) and data.device.type == "cpu", name
        begin, end = end, end + data.numel() * data.element_size()
        header[name] = {"dtype": DTYPE_NAMES[data.dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def chunks() -> Iterator[Buffer]:
        yield len(text).to_bytes(8, "little") + text
        for name in order:
            yield as_bytes(tensors[name][1]).numpy().data

    return write_file(path, chunks())


class TensorFile:
    """An open safetensors file; `entries` lists its tensors. Use as a context manager.

    Raises UserError, naming the file, when it is missing, cut short or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{path}: cannot be opened ({error.strerror})") from error
        try:
            self.entries = self._parse(os.fstat(self._fd).st_size)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def _parse(self, size: int) -> dict[str, TensorEntry]:
        """Header of a file of `size` bytes, every offset checked against that size."""
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise UserError(f"{self.path}: not a whole safetensors file ({size} bytes, header length {length})")
        try:
            header = json.loads(os.pread(self._fd, length, 8))
            header.pop("__metadata__", None)
            entries = {name: self._entry(name, value, 8 + length, size) for name, value in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path}: the safetensors header is damaged ({error})") from error
        return entries

    def _entry(self, name: str, value: dict, base: int, size: int) -> TensorEntry:
        """One tensor's entry, absolute and checked; data starts at byte `base` of a file of `size` bytes."""
        if value["dtype"] not in DTYPES:
            raise UserError(f"{self.path}: {name} has element type {value['dtype']}; known are {', '.join(DTYPES)}")
        begin, end = value["data_offsets"]
        entry = TensorEntry(DTYPES[value["dtype"]], tuple(value["shape"]), base + begin)
        if end - begin != entry.numel * entry.dtype.itemsize or begin < 0:
            raise UserError(f"{self.path}: {name} of shape {entry.shape} cannot take {end - begin} bytes")
        if base + end > size:
            raise UserError(f"{self.path}: cut short, {name} ends at byte {base + end} of {size}")
        return entry

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill 1-D `out` with elements [start, start + len(out)) of the row-major tensor `name`.

        Only those bytes are read. Another element type or device than the file's is converted in bounded memory.
        """
        entry = self.entries[name]
        assert out.dim() == 1 and start >= 0 and start + out.numel() <= entry.numel, name
        width = entry.dtype.itemsize
        if out.dtype == entry.dtype and out.device.type == "cpu" and out.is_contiguous():
            self._read(as_bytes(out.detach()), entry.begin + start * width)
            return
        step = CHUNK_BYTES // width
        buffer = torch.empty(min(step, out.numel()), dtype=entry.dtype)
        for low in range(0, out.numel(), step):
            part = buffer[: min(step, out.numel() - low)]
            self._read(as_bytes(part), entry.begin + (start + low) * width)
            out.detach()[low : low + part.numel()].copy_(part)

    def _read(self, out: torch.Tensor, offset: int) -> None:
        """Fill the uint8 tensor `out` from byte `offset` on."""
        view = out.numpy().data
        while view:
            try:
                count = os.preadv(self._fd, [view[: 1 << 30]], offset)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be read at byte {offset} ({error.strerror})") from error
            if count == 0:
                raise UserError(f"{self.path}: cut short, no byte at {offset}")
            view, offset = view[count:], offset + count
