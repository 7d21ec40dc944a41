import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline import sources as module
from data_pipeline.sources import Cursor, ReadOptions, find_sources, parse_unit, read_units


def read_all(path, cursor=Cursor(), **options):  # noqa: B008 - frozen
    """(texts, bad, empty, cursors) of one input."""
    read = ReadOptions(**options)
    (source,) = find_sources([path], read)
    texts, bad, empty, cursors = [], [], 0, []
    for unit in read_units(source, read, cursor):
        documents = parse_unit(unit, read)
        texts += documents.texts
        bad += documents.bad
        empty += documents.empty
        cursors.append((unit.after, len(texts)))
    return texts, bad, empty, cursors


def write(path, data):
    if path.suffix == ".gz":
        half = len(data) // 2
        data = gzip.compress(data[:half]) + gzip.compress(data[half:])  # two members are one file
    elif path.suffix == ".zst":
        half = len(data) // 2
        data = zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    path.write_bytes(data)
    return path


TEXTS = [f"document {i} é\n\twith lines" * (i % 7 + 1) for i in range(200)]


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.json.zst", "c.ndjson", "c.parquet", "hf", "hf streamed"])
@pytest.mark.parametrize("unit_bytes", [200, 1 << 20])
def test_formats_and_going_on_from_every_cursor(tmp_path, monkeypatch, name, unit_bytes):
    monkeypatch.setattr(module, "UNIT_BYTES", unit_bytes)
    monkeypatch.setattr(module, "ROWS_PER_READ", 16)
    path = tmp_path / name
    if name == "c.parquet":
        pq.write_table(pa.table({"text": TEXTS, "n": list(range(200))}), path, row_group_size=37)
    elif name.startswith("hf"):
        import datasets

        datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(path)
    else:
        write(path, "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode())
    options = {"hf_streaming": name == "hf streamed"}
    texts, bad, empty, cursors = read_all(path, **options)
    assert (texts, bad, empty) == (TEXTS, [], 0)
    assert len(cursors) > 5 or unit_bytes > 200
    for cursor, seen in cursors[:: max(1, len(cursors) // 6)]:
        assert read_all(path, cursor, **options)[0] == TEXTS[seen:]


def test_data_set_by_name_needs_no_other_code(tmp_path):
    """`hf:` with a directory of data files goes through datasets.load_dataset."""
    write(tmp_path / "part.jsonl", b'{"text": "one"}\n{"text": "two"}\n')
    assert read_all(f"hf:{tmp_path}")[0] == ["one", "two"]
    assert read_all(f"hf:{tmp_path}", hf_streaming=True)[0] == ["one", "two"]


def test_text_files(tmp_path):
    content = "first line\r\n\n  \nthird  line \u2028 x\r\nlast"
    path = write(tmp_path / "t.txt", content.encode())
    assert read_all(path)[0] == [content]
    texts, bad, empty, _ = read_all(path, text_documents="line")
    assert texts == ["first line", "third  line \u2028 x", "last"]
    assert (bad, empty) == ([], 1)
    assert read_all(write(tmp_path / "t.txt.zst", content.encode()))[0] == [content]
    assert read_all(write(tmp_path / "empty.txt", b""))[:3] == ([], [], 1)


BAD_LINES = [
    (b"{not json", "not JSON: .* at column 2"),
    (b'{"text": "cut off', "not JSON"),
    (b'["a"]', "a JSON list, not an object"),
    (b'{"body": "x", "id": 1}', r"no key 'text' \(--text-key\); it has body, id"),
    (b'{"text": 5}', "'text' holds int, not text"),
    (b'{"text": null}', "holds NoneType"),
    (b'{"text": "a\xff\xfe"}', "not UTF-8 at byte 11"),
    (b'{"text": "\\ud800 alone"}', "lone surrogate at character 0"),
    (b"[" * 100_000, "not JSON|recursion"),
    (b'{"text": "' + b"x" * 600_000 + b'"}', "longer than --max-document-mb"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
@pytest.mark.parametrize("unit_bytes", [64, 1 << 20])
def test_a_bad_line_is_skipped_and_its_place_told(tmp_path, monkeypatch, line, reason, unit_bytes):
    monkeypatch.setattr(module, "UNIT_BYTES", unit_bytes)
    path = write(tmp_path / "c.jsonl", b'{"text": "good"}\n\n' + line + b'\n{"text": "after"}\n{"text": ""}\n' + line)
    texts, bad, empty, _ = read_all(path, max_document_bytes=500_000)
    assert (texts, empty) == (["good", "after"], 1)
    assert [place for place, _ in bad] == [f"{path}:3", f"{path}:6"]
    for _, found in bad:
        assert pytest.importorskip("re").search(reason, found)


def test_long_lines_are_judged_alike_however_they_are_read(tmp_path, monkeypatch):
    lines = [b'{"text": "' + b"y" * n + b'"}' for n in (5, 480, 486, 487, 488, 489, 600, 7, 2000, 488, 3)]
    path = write(tmp_path / "c.jsonl", b"\n".join(lines) + b"\n")
    results = set()
    for unit_bytes in (16, 100, 499, 500, 501, 1000, 1 << 20):
        monkeypatch.setattr(module, "UNIT_BYTES", unit_bytes)
        texts, bad, _, cursors = read_all(path, max_document_bytes=500)
        results.add(json.dumps([texts, bad]))
        for cursor, seen in cursors:
            assert read_all(path, cursor, max_document_bytes=500)[0] == texts[seen:]
    assert len(results) == 1
    assert [len(text) for text in json.loads(results.pop())[0]] == [5, 480, 486, 487, 488, 7, 488, 3]


def test_nasty_text_is_not_altered(tmp_path):
    texts = ["\x00\x01\x7f\x85", "a\r\nb\rc", "\ufeffbom inside", "\U0001f600\u200d", " spaces \t", "\u2028\u2029x"]
    data = (
        b"\xef\xbb\xbf"
        + "\n".join(json.dumps({"text": t}, ensure_ascii=i % 2 == 0) for i, t in enumerate(texts)).encode()
    )
    assert read_all(write(tmp_path / "c.jsonl", data))[:2] == (texts, [])
    raw_control = b'{"text": "tab\tand\x01control"}\r\n'
    assert read_all(write(tmp_path / "d.jsonl", raw_control))[0] == ["tab\tand\x01control"]


def test_parquet_with_bad_rows(tmp_path):
    column = pa.array([b"good", b"\xff\xfe", None, b"", b"after"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "c.parquet")
    texts, bad, empty, _ = read_all(tmp_path / "c.parquet")
    assert (texts, empty) == (["good", "after"], 1)
    assert [place.rsplit(":", 1)[1] for place, _ in bad] == ["2", "3"]


def test_directories_and_patterns(tmp_path):
    for name in ("b.jsonl", "a.txt", "sub/c.jsonl.gz", "ignored.bin", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, b'{"text": "x"}')
    found = [source.path for source in find_sources([tmp_path], ReadOptions())]
    assert found == [str(tmp_path / name) for name in ("a.txt", "b.jsonl", "sub/c.jsonl.gz")]
    found = [source.path for source in find_sources([f"{tmp_path}/**/*.gz"], ReadOptions())]
    assert found == [str(tmp_path / "sub/c.jsonl.gz")]
