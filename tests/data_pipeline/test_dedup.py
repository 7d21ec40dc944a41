"""Duplicates: judged against sets and Jaccard likeness computed by hand."""

import itertools
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.dedup import EXACT, KEPT, NEAR, Deduplicator, KeyTable
from data_pipeline.fingerprint import HASHES, SHINGLE, band_keys, bands_for, fingerprints, signature, words
from data_pipeline.prepare import PrepareOptions, prepare
from data_pipeline.store import verify_store
from nexa.errors import UserError
from tests.data_pipeline.conftest import WORDS, make_texts
from tests.data_pipeline.test_prepare import content_of, documents_of


def prints(texts, near=True):
    return fingerprints(texts, [text.encode() for text in texts], near)


def jaccard(a, b):
    """Likeness of two texts as sets of runs of words, directly."""
    left, right = (
        {tuple(w[i : i + SHINGLE]) for i in range(max(1, len(w) - SHINGLE + 1))} for w in (words(a), words(b))
    )
    return len(left & right) / len(left | right)


def changed(text, share, rng):
    """The text with a share of its words replaced."""
    parts = text.split()
    for place in rng.choice(len(parts), max(1, int(share * len(parts))), replace=False):
        parts[place] = f"new{rng.integers(10**6)}"
    return " ".join(parts)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 999)), max_size=60), max_size=8))
def test_table_is_a_dictionary_that_keeps_the_first_value(batches):
    table, reference = KeyTable(), {}
    table._allocate(8)  # small: collisions, and several growths
    for batch in batches:
        keys = np.array([key for key, _ in batch], np.uint64)
        table.put(keys, np.array([value for _, value in batch], np.int64))
        for key, value in batch:
            reference.setdefault(key, value)
        asked = np.array([*reference, 3, 2**63], np.uint64)
        assert table.get(asked).tolist() == [reference.get(key, -1) for key in asked.tolist()]
    assert len(table) == len(reference)


def test_words_fold_case_and_punctuation_and_cut_unspaced_scripts():
    assert words("Don't STOP, now…") == ["don", "t", "stop", "now"]
    assert words("日本語 text ไทย") == ["日", "本", "語", "text", "ไ", "ท", "ย"]
    assert words("!?") == []


def test_signatures_estimate_likeness():
    rng = np.random.default_rng(0)
    text = " ".join(f"w{number}" for number in rng.integers(0, 5000, 400))
    for share in (0.005, 0.02, 0.05, 0.1):
        other = changed(text, share, rng)
        found = np.mean(signature(text) == signature(other))
        true = jaccard(text, other)
        assert abs(found - true) < 4 * np.sqrt(true * (1 - true) / HASHES)
    assert np.mean(signature(text) == signature("nothing in common with the other one at all")) < 0.05
    assert (signature("Some WORDS, of  a text") == signature("some words of a text!")).all()
    assert (signature("!!!") != signature("???")).all()
    assert (signature(f"{text} {text}") == signature(text)).mean() > 0.95  # a set, not a count


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_bring_pairs_of_the_threshold_together(threshold):
    bands, rows = bands_for(threshold)
    assert bands * rows <= HASHES
    rng = np.random.default_rng(1)
    left = rng.integers(0, 2**32, (2000, HASHES), dtype=np.uint32)
    other = rng.integers(0, 2**32, left.shape, dtype=np.uint32)
    right = np.where(rng.random(left.shape) < threshold, left, other)
    met = (band_keys(left, bands, rows) == band_keys(right, bands, rows)).any(axis=1).mean()
    assert met > 0.955  # at least 0.97 expected
    assert (band_keys(left, bands, rows) != band_keys(other, bands, rows)).all()
    assert len(np.unique(band_keys(left[:1], bands, rows))) == bands


@pytest.mark.parametrize("cut", [1, 3, 1000])
def test_exact_verdicts_are_those_of_a_set(tmp_path, cut):
    rng = np.random.default_rng(2)
    texts = [f"text {number}" for number in rng.integers(0, 300, 900)]
    dedup, found = Deduplicator(tmp_path, None), []
    for first in range(0, len(texts), cut):
        found += dedup.judge(prints(texts[first : first + cut], near=False)).tolist()
    seen = set()
    assert found == [EXACT if text in seen or seen.add(text) else KEPT for text in texts]
    assert dedup.flush() == len(seen)


def near_corpus(rng, originals=40):
    """(texts, number of the original of each): three changed copies each, 2 % to 20 % of the words replaced."""
    texts, origin = [], []
    for number in range(originals):
        base = " ".join(f"w{word}" for word in rng.integers(0, 10**6, 200))
        for share in (0.0, 0.002, 0.01, 0.3):
            texts.append(changed(base, share, rng) if share else base)
            origin.append(number)
    order = rng.permutation(len(texts))
    return [texts[i] for i in order], [origin[i] for i in order]


def test_near_verdicts_against_all_pairs(tmp_path):
    texts, _ = near_corpus(np.random.default_rng(3))
    verdicts = Deduplicator(tmp_path, 0.8).judge(prints(texts)).tolist()
    kept, wrong = [], 0
    for text, verdict in zip(texts, verdicts, strict=True):
        likeness = max((jaccard(text, other) for other in kept), default=0.0)
        if abs(likeness - 0.8) > 0.12:  # more than three standard errors
            wrong += (verdict == NEAR) != (likeness > 0.8)
        if verdict == KEPT:
            kept.append(text)
    assert wrong == 0
    assert 40 < verdicts.count(NEAR) < 120


def test_going_on_from_the_disk_gives_the_same_verdicts(tmp_path):
    texts, _ = near_corpus(np.random.default_rng(4))
    texts += texts[::7]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = Deduplicator(tmp_path / "a", 0.8).judge(prints(texts)).tolist()
    assert {KEPT, EXACT, NEAR} == set(whole)
    found, kept, position = [], 0, 0
    for step in (13, 40, 1, 60, 200):
        dedup = Deduplicator(tmp_path / "b", 0.8, kept)
        found += dedup.judge(prints(texts[position : position + step])).tolist()
        kept, position = dedup.flush(), position + step
        dedup.judge(prints(["work that was never saved", *texts[position : position + 9]]))
        dedup.close()
    assert found == whole
    with pytest.raises(UserError, match=r"dedup\.digests: shorter than"):
        Deduplicator(tmp_path / "b", 0.8, 10**6)


def write_corpora(directory):
    """Two files with exact duplicates within and across them, and near ones."""
    rng = np.random.default_rng(5)
    texts, _ = near_corpus(rng, 30)
    plain = make_texts(60, seed=6)
    files = {"a.jsonl": texts[:60] + plain[:40], "b.jsonl": plain[20:] + texts[60:] + texts[:10] + ["", " "]}
    for name, documents in files.items():
        (directory / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return [directory / name for name in files], files


def test_prepare_keeps_the_first_of_equals(tmp_path, capsys):
    paths, files = write_corpora(tmp_path)
    options = PrepareOptions(tokenizer="bytes", validation_fraction=0.2, dedup="exact")
    manifest = prepare(paths, tmp_path / "out", options, workers=1)
    documents = [text for text in itertools.chain(*files.values()) if text.strip()]
    unique = list(dict.fromkeys(documents))
    stored = {split: documents_of(tmp_path / "out", split) for split in ("train", "validation")}
    order = {text: number for number, text in enumerate(unique)}
    assert sorted(itertools.chain(*stored.values()), key=order.__getitem__) == unique
    assert all(part == sorted(part, key=order.__getitem__) for part in stored.values())
    first, second = manifest["sources"]
    assert (first["documents"], first["duplicates"]) == (100, 0)
    assert second["duplicates"] == len(documents) - len(unique) == manifest["duplicates"] == 30
    assert (second["empty"], second["near_duplicates"]) == (2, 0)
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in unique)
    assert manifest["removed_bytes"] == sum(len(text.encode()) for text in documents) - manifest["text_bytes"]
    assert manifest["tokens"] == manifest["text_bytes"] + len(unique)
    line = (
        f"b.jsonl: {len(files['b.jsonl'])} documents, {second['documents']} kept, 32 removed (2 empty, 30 duplicates)"
    )
    assert line in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("dedup.*"))
    verify_store(tmp_path / "out")


SMALL = (
    "import sys, data_pipeline.sources as s, data_pipeline.prepare as p\n"
    "s.UNIT_BYTES = int(sys.argv[3])\n"
    "options = p.PrepareOptions(tokenizer='bytes', validation_fraction=0.2, dedup='near', shard_tokens=9000)\n"
    "if __name__ == '__main__':\n"
    "    p.prepare(sys.argv[4:], sys.argv[1], options, workers=int(sys.argv[2]), checkpoint_seconds=0.0)\n"
)


def test_near_result_depends_neither_on_workers_nor_on_kills(tmp_path):
    paths, _ = write_corpora(tmp_path)
    (tmp_path / "run.py").write_text(SMALL)

    def command(out, workers, unit):
        words = [sys.executable, tmp_path / "run.py", tmp_path / out, workers, unit, *paths]
        return [str(word) for word in words]

    subprocess.run(command("one", 1, 4000), check=True, stderr=subprocess.DEVNULL)
    subprocess.run(command("two", 2, 4000), check=True, stderr=subprocess.DEVNULL)
    kills = 0
    for _ in range(4):
        process = subprocess.Popen(command("killed", 1, 4000), stderr=subprocess.DEVNULL)
        state, before = tmp_path / "killed" / "progress.json", None
        while process.poll() is None:
            now = state.read_bytes() if state.is_file() else b""
            before = before or now
            if b'"writer"' in now and now != before:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills
    subprocess.run(command("killed", 1, 4000), check=True, stderr=subprocess.DEVNULL)
    content = content_of(tmp_path / "one")
    assert content == content_of(tmp_path / "two") == content_of(tmp_path / "killed")
    manifest = json.loads(content["manifest.json"])
    assert manifest["near_duplicates"] > 20


def test_old_recipe_is_unchanged_without_dedup_and_options_are_checked(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\n')
    plain = PrepareOptions(tokenizer="bytes")
    manifest = prepare([tmp_path / "c.jsonl"], tmp_path / "out", plain, workers=1)
    assert not {"dedup", "near_threshold"} & set(manifest["recipe"])
    for dedup in ("exact", "near"):
        with pytest.raises(UserError, match="finished store of other dedup"):
            prepare([tmp_path / "c.jsonl"], tmp_path / "out", PrepareOptions(tokenizer="bytes", dedup=dedup), workers=1)
    for options, message in (
        (PrepareOptions(tokenizer="bytes", dedup="fuzzy"), "--dedup: 'fuzzy'; must be exact or near"),
        (PrepareOptions(tokenizer="bytes", near_threshold=0.0), r"--near-threshold: 0\.0; must be above 0"),
    ):
        with pytest.raises(UserError, match=message):
            prepare([tmp_path / "c.jsonl"], tmp_path / "other", options, workers=1)


def test_shared_vocabulary_alone_is_no_likeness(tmp_path):
    texts = [" ".join(np.random.default_rng(seed).choice(WORDS, 60)) for seed in range(200)]
    assert not Deduplicator(tmp_path, 0.8).judge(prints(texts)).any()
