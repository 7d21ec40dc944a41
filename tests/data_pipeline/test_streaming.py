"""Streams against the same documents concatenated by hand, from the start and from every place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.hub import DOCUMENTS, HubSource, HubStream
from data_pipeline.streaming import StreamBatches
from nexa.errors import UserError

T, EOD = 16, 256
SIZES = (DOCUMENTS + 7, 1, 2 * DOCUMENTS)
"""Documents of each file."""


def texts() -> list[str]:
    """Of 0 to 90 bytes, two of them empty and one blank."""
    random = np.random.default_rng(3)
    found = [f"{n} " + "é" * int(random.integers(0, 43)) for n in range(sum(SIZES))]
    found[4], found[100], found[-1] = "", "  ", ""
    return found


def write(folder: Path, kind: str) -> Path:
    folder.mkdir()
    first = 0
    for number, size in enumerate(SIZES):
        part = [{"id": n, "text": text} for n, text in enumerate(texts()[first : first + size], first)]
        first += size
        if kind == "jsonl.gz":
            with gzip.open(folder / f"part{number}.jsonl.gz", "wt", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in part)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(part), folder / f"part{number}.parquet", row_group_size=20)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import datasets

    root = tmp_path_factory.mktemp("hub")
    datasets.Dataset.from_dict({"text": texts()}).save_to_disk(root / "saved")
    return {"saved": root / "saved"} | {
        kind: write(root / kind.split(".")[0], kind) for kind in ("jsonl.gz", "parquet")
    }


def joined(documents: list[str]) -> np.ndarray:
    """Bytes of all documents that are not blank, each with the end-of-document token."""
    return np.array([i for text in documents if text.strip() for i in [*text.encode(), EOD]])


def batches(source: HubSource, batch: int = 3, **more: Any) -> StreamBatches:
    return StreamBatches(HubStream(source, "bytes"), sequence_length=T, global_batch_size=batch, **more)


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet", "saved"])
def test_rows_are_the_documents_end_to_end(folders: dict[str, Path], kind: str) -> None:
    tokens = joined(texts())
    steps = (len(tokens) - 1) // (3 * T)
    stream = batches(HubSource(str(folders[kind])))
    assert stream.tokens_by_source(7) == {folders[kind].name: 7 * 3 * T} and stream.epochs(7) == {}
    for step in range(steps):
        parts = [stream.rows(step, row, row + 1) for row in range(3)]
        at = step * 3 * T
        assert np.concatenate([part.input_ids for part in parts]).ravel().tolist() == tokens[at : at + 3 * T].tolist()
        assert (
            np.concatenate([part.labels for part in parts]).ravel().tolist() == tokens[at + 1 : at + 3 * T + 1].tolist()
        )
    assert stream.sample_ids(2) == [(folders[kind].name, n) for n in (6, 7, 8)]
    with pytest.raises(
        UserError, match=rf"ended after {len(tokens)} tokens, in step {steps + 1}: .*stop_at={steps} to"
    ):
        stream.rows(steps, 0, 3)


def test_masked_documents(folders: dict[str, Path]) -> None:
    tokens = joined(texts())
    document = np.cumsum(np.concatenate([[0], tokens[:-1] == EOD]))
    stream = batches(HubSource(str(folders["parquet"])), document_mask=True)
    for step in range(20):
        rows = stream.rows(step, 0, 3)
        for row in range(3):
            at = (3 * step + row) * T
            assert rows.document_ids is not None
            assert rows.document_ids[row].tolist() == (document[at : at + T] - document[at]).tolist()
            same = document[at : at + T] == document[at + 1 : at + T + 1]
            assert rows.labels[row].tolist() == np.where(same, tokens[at + 1 : at + T + 1], -100).tolist()


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet", "saved"])
@pytest.mark.parametrize("shuffle", [0, 70])
def test_every_place_goes_on_exactly(folders: dict[str, Path], kind: str, shuffle: int) -> None:
    """Also with another batch size, with a buffer too: a window is read again from its beginning."""
    source = HubSource(str(folders[kind]), shuffle_buffer=shuffle, seed=5)
    whole, rows, places = batches(source), [], []
    for step in range(100):
        places.append(json.loads(json.dumps(whole.position(step))))
        rows += whole.rows(step, 0, 3).input_ids.tolist()
    for step in (0, 1, 17, 50, 99):
        for size in (1, 3, 5):
            later = batches(source, size, first_sample=3 * step - 40 * size, first_step=40, place=places[step])
            count = min(4, (300 - 3 * step) // size)
            found = [row for s in range(40, 40 + count) for row in later.rows(s, 0, size).input_ids.tolist()]
            assert found == rows[3 * step : 3 * step + count * size]
            assert later.tokens_by_source(40) == whole.tokens_by_source(step)
            assert later.sample_ids(40)[0] == whole.sample_ids(step)[0]


def test_a_buffer_permutes_windows(folders: dict[str, Path]) -> None:
    def documents(seed: int, buffer: int = 70) -> list[str]:
        source = HubSource(str(folders["parquet"]), shuffle_buffer=buffer, seed=seed)
        stream = batches(source, 1)
        steps = (len(joined(texts())) - 1) // T
        ids = [i for step in range(steps) for i in stream.rows(step, 0, 1).input_ids[0].tolist()]
        text = bytes(i if i < 256 else 0 for i in ids).split(b"\0")
        return [part.decode() for part in text[:-1]]

    plain, shuffled = documents(0, 0), documents(0)
    kept = [text for text in texts() if text.strip()]
    assert plain == kept[: len(plain)] and len(plain) >= len(kept) - 2
    assert shuffled != plain and documents(0) == shuffled != documents(1)
    first = [text for text in texts()[:70] if text.strip()]
    assert sorted(shuffled[: len(first)]) == sorted(first) and shuffled[: len(first)] != first


def test_positions_of_the_last_steps_are_kept(folders: dict[str, Path]) -> None:
    stream = batches(HubSource(str(folders["parquet"])), kept=4)
    for step in range(9):
        stream.rows(step, 0, 3)
    assert all(stream.position(step) for step in (6, 7, 8, 9))
    with pytest.raises(KeyError):
        stream.position(5)
    for step in (7, 10):  # neither the one held nor the next
        with pytest.raises(IndexError):
            stream.rows(step, 0, 3)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"name": "no/such/folder/anywhere"}, r"data\.source=hf:no/such/folder/anywhere: the data set cannot be opened \("),
    ({"name": "nobody/nothing"}, r"data\.source=hf:nobody/nothing: the data set cannot be opened"),
    ({"split": "holdout"}, r"cannot be opened \(ValueError: Bad split: holdout.*see data\.hf_config, data\.hf_split"),
    ({"config": "german"}, r"cannot be opened \(ValueError: BuilderConfig 'german' not found"),
    ({"text_key": "body"}, r"data\.text_key=body: .* has no such column; it has id, text"),
    ({"text_key": "id"}, r"data\.text_key=id: holds int in .*, not text"),
]


@pytest.mark.parametrize(("changes", "named"), BAD, ids=[named[:40] for _, named in BAD])
def test_what_cannot_be_opened(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], named: str
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=named):
        HubStream(HubSource(**{"name": str(folders["parquet"]), **changes}), "bytes")


def test_reading_that_fails_later(tmp_path: Path) -> None:
    """The second file is broken: the first one's batches come, then the message."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "x" * 99}) + "\n" for _ in range(5)))
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    stream = batches(HubSource(str(tmp_path)), 1)

    def read_all() -> None:
        for step in range(50):
            stream.rows(step, 0, 1)

    with pytest.raises(UserError, match=r"reading failed \(.*goes on from the newest checkpoint"):
        read_all()


def test_a_token_outside_the_vocabulary(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size: 100, but"):
        batches(HubSource(str(folders["parquet"])), vocab_size=100).rows(0, 0, 3)
