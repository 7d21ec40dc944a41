"""Preparing needs no more memory for a larger corpus, and hands out no more work than it may."""

import json
import os
import subprocess
import sys

import pytest

from data_pipeline import workers
from data_pipeline.sources import Cursor, ReadOptions, Source, Unit
from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.workers import Work, tokenize_units
from tests.conftest import REPOSITORY

PEAK = """
import resource, sys
from data_pipeline.prepare import PrepareOptions, prepare
if __name__ == "__main__":
    options = PrepareOptions(tokenizer="bytes", dedup=sys.argv[4] or None)
    prepare([sys.argv[1]], sys.argv[2], options, workers=int(sys.argv[3]), checkpoint_seconds=0.2)
    own = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10)
"""


def peaks(corpus, out, count, dedup=""):
    """Bytes of resident memory at most: of the main process, and of its largest child."""
    words = [sys.executable, "-c", PEAK, corpus, out, count, dedup]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True, env=environment)
    return [int(number) for number in done.stdout.split()]


@pytest.mark.parametrize("count", [1, 2])
def test_memory_does_not_grow_with_the_corpus(tmp_path, count):
    """More documents, the longest as long as before: no more than the noise of the allocator."""
    found = []
    for repeats in (4, 14):
        path = tmp_path / f"{repeats}.jsonl"
        with open(path, "w") as stream:
            for number in range(repeats):
                stream.write(json.dumps({"text": f"{number} long " * 300_000}) + "\n")
                stream.writelines(json.dumps({"text": f"{number} {place} short " * 60}) + "\n" for place in range(4000))
        found.append(peaks(path, tmp_path / f"out{repeats}", count))
    assert (tmp_path / "14.jsonl").stat().st_size > 70e6
    for small, large in zip(*found, strict=True):
        assert large - small < 15e6


def test_huge_documents_do_not_pile_up(monkeypatch):
    """At most UNDER_WAY bytes and one unit more are handed out before a result is taken."""
    monkeypatch.setattr(workers, "UNDER_WAY", 1000)
    source, handed = Source("x", "text", 1, ""), []

    def units():
        for number in range(12):
            handed.append(number)
            yield 0, Unit(source, [b"x" * 600], number + 1, Cursor(number + 1, 0), number)

    work = Work(ReadOptions(), 0.0)
    for taken, result in enumerate(tokenize_units(units(), ("bytes", load_tokenizer("bytes")), work, 4)):
        assert result.tokens == 601
        assert result.after == Cursor(taken + 1, 0)
        assert len(handed) - taken <= 3  # without the bound in bytes, 9
