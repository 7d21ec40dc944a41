"""Our writer against the library's reader, our reader against the library's writer."""

import json

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from nexa.checkpoint import files
from nexa.checkpoint.safetensors_io import DTYPES, Blocks, TensorFile, write_tensors
from nexa.errors import UserError


def _tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(5, 7, generator=generator) * 50).abs().to(dtype).clone() for name, dtype in DTYPES.items()
    } | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}


def _plain(tensor):
    return Blocks(tuple(tensor.shape), 0, [tensor.reshape(-1)])


def test_library_reads_what_we_write(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = _tensors()
    record = write_tensors(path, {n: _plain(t) for n, t in tensors.items()}, {"format": "pt"})
    read = safetensors.torch.load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in tensors.items())
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert record == files.FileRecord(path.stat().st_size, files.hash_file(path))


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_parts_along_any_dimension_make_the_whole(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("nexa.checkpoint.safetensors_io._CACHED_BYTES", 64)
    full = torch.arange(4 * 6 * 5).view(4, 6, 5).to(dtype)
    cuts = {0: [1, 0, 3], 1: [5, 1], 2: [2, 2, 1]}
    tensors = {
        str(dim): Blocks((4, 6, 5), dim, [part.reshape(-1) for part in full.split(sizes, dim)])
        for dim, sizes in cuts.items()
    }
    write_tensors(tmp_path / "p.safetensors", tensors, {})
    read = safetensors.torch.load_file(tmp_path / "p.safetensors")
    assert read.keys() == {"0", "1", "2"}
    assert all(torch.equal(one, full) for one in read.values())


def test_any_range_of_a_library_file_in_any_type(tmp_path):
    path = tmp_path / "b.safetensors"
    tensors = _tensors()
    safetensors.torch.save_file(tensors, path)

    @given(
        st.sampled_from(sorted(DTYPES)),
        st.tuples(st.integers(0, 35), st.integers(0, 35)),
        st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    )
    def check(name, edges, dtype):
        start, stop = sorted(edges)
        same, other = torch.empty(stop - start, dtype=DTYPES[name]), torch.empty(stop - start, dtype=dtype)
        with TensorFile(path) as source:
            source.read_into(name, start, same)
            source.read_into(name, start, other)
        expected = tensors[name].reshape(-1)[start:stop]
        assert torch.equal(same, expected)
        assert torch.equal(other, expected.to(dtype))

    check()


def test_conversion_works_in_several_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("nexa.checkpoint.safetensors_io.CHUNK_BYTES", 12)
    values = torch.randn(20)
    safetensors.torch.save_file({"x": values}, tmp_path / "c.safetensors")
    out = torch.empty(17, dtype=torch.float64)
    with TensorFile(tmp_path / "c.safetensors") as source:
        source.read_into("x", 2, out)
    assert torch.equal(out, values[2:19].double())


def _with_header(value, data=b"") -> bytes:
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole safetensors file"),
        (b"\xff" * 20, "not a whole safetensors file"),
        (b"\x04" + b"\0" * 7 + b"{]]}", "header is damaged"),
        (_with_header([1]), "header is damaged"),
        (_with_header({"x": {"dtype": "F32"}}), "header is damaged"),
        (
            _with_header({"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
            "x has element type F99",
        ),
        (_with_header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"), "x of shape"),
        (_with_header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"), "cut short, x ends"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        TensorFile(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.safetensors: cannot be opened"):
        TensorFile(tmp_path / "none.safetensors")
