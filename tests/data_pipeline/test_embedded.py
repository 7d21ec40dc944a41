import shutil
import subprocess
import sys
import time

import pytest

from data_pipeline.embedded import embedded_documents, embedded_store
from data_pipeline.store import open_store, verify_store
from data_pipeline.tokenizer import load_tokenizer
from nexa.errors import UserError


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    start = time.process_time()
    return cache, embedded_store(str(cache), 600), time.process_time() - start


def test_content(built):
    _, path, seconds = built
    assert seconds < 12
    train, validation = open_store(path, "train"), open_store(path, "validation")
    assert train.name == validation.name == "embedded"
    assert train.tokens > 2_000_000
    assert 0.02 < validation.tokens / train.tokens < 0.12
    assert train.vocab_size == 600
    verify_store(path)
    tokenizer = load_tokenizer(path)
    text = tokenizer.decode(validation.read(0, validation.tokens).tolist())
    assert text == "".join(t + tokenizer.eod for split, t in embedded_documents() if split == "validation")


def test_prose_and_code_and_no_leak():
    documents = embedded_documents()
    size = sum(len(text.encode()) for _, text in documents)
    assert 4e6 < size < 8.5e6
    train = {text for split, text in documents if split == "train"}
    assert train.isdisjoint(text for split, text in documents if split == "validation")
    assert any("def " in text and "import " in text for text in train)
    code = sum(len(text) for _, text in documents if "import " in text and "def " in text)
    assert 0.5 < code / size < 0.95


def test_second_call_is_quick_and_the_same(built):
    cache, path, _ = built
    start = time.process_time()
    assert embedded_store(str(cache), 600) == path
    open_store(path)
    assert time.process_time() - start < 0.2


def test_deterministic_over_processes_and_safe_at_once(built, tmp_path):
    _, path, _ = built
    code = "import sys; from data_pipeline.embedded import embedded_store; print(embedded_store(sys.argv[1], 600))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    (other,) = {out.strip() for out, _ in results}
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [path.name]
    for split in ("train", "validation"):
        assert open_store(other, split).fingerprint == open_store(path, split).fingerprint


def test_a_left_over_build_does_not_matter(built, tmp_path, monkeypatch):
    """What a killed builder left: its directory aside, and its lock file."""
    _, path, _ = built
    (tmp_path / f".{path.name}-dead").mkdir()
    (tmp_path / f"{path.name}.lock").touch()
    monkeypatch.setattr("data_pipeline.embedded._build", lambda target, vocab_size: shutil.copytree(path, target))
    assert embedded_store(str(tmp_path), 600) == tmp_path / path.name


def test_default_place(built, tmp_path, monkeypatch):
    _, path, _ = built
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("data_pipeline.embedded._build", lambda target, vocab_size: shutil.copytree(path, target))
    assert embedded_store(None, 600) == tmp_path / "nexa" / path.name


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match=r"data\.tokenizer_vocab_size: 256 .*model\.vocab_size.* at least 257"):
        embedded_store(str(tmp_path), 256)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache_dir: .*file/x"):
        embedded_store(str(tmp_path / "file" / "x"), 600)
