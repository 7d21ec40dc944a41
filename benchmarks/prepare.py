"""`nexa data prepare` under a memory limit and kills, and against the `tokenizers` library alone.

    python benchmarks/prepare.py --size-mb 2000 --memory-mb 1024 --kills 5

A synthetic corpus (words by Zipf's law, documents of log-normal length, every 1000th one of 2 MB; one jsonl and one
text file by lines) is prepared once unbroken, with a BPE trained on it before. Then it is prepared again and killed
(SIGKILL, all processes) --kills times, each time after another equal share of the tokens was written, and goes on to
the end: the files must be the same to the byte. Memory is the sum of the proportional set sizes (shared pages counted
once) of all its processes, sampled every 50 ms; above --memory-mb the benchmark fails. The library alone encodes the
first 32 MB of the same texts, held in memory, with as many threads as workers, right after the unbroken run: one call
of encode_batch_fast, without reading, hashing or writing anything. Ratios are given of the clock and of
CPU time; the second is the one to trust on a machine that others use, too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

VOCABULARY = 50_000
LIBRARY_MB = 32
POLL_SECONDS = 0.05
PROGRAM = """
import sys
from data_pipeline.prepare import PrepareOptions, prepare
from data_pipeline.sources import ReadOptions
if __name__ == "__main__":
    tokenizer, out, workers, dedup, *inputs = sys.argv[1:]
    options = PrepareOptions(ReadOptions(text_documents="line"), tokenizer=tokenizer, dedup=dedup or None)
    prepare(inputs, out, options, workers=int(workers), checkpoint_seconds=2.0)
"""


def make_words(rng: np.random.Generator) -> np.ndarray:
    """Words of 2 to 11 letters."""
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    lengths = rng.integers(2, 12, VOCABULARY)
    return np.array(["".join(rng.choice(letters[: 8 + length], length)) for length in lengths], dtype=object)


def documents(megabytes: int) -> Iterator[str]:
    """Texts of `megabytes` MB together."""
    rng = np.random.default_rng(0)
    words, number, size = make_words(rng), 0, 0
    while size < megabytes * 10**6:
        number += 1
        count = 300_000 if number % 1000 == 0 else int(min(rng.lognormal(5.5, 1.0) + 3, 50_000))
        text = " ".join(words[np.minimum(rng.zipf(1.3, count) - 1, VOCABULARY - 1)])
        size += len(text)
        yield text


def write_corpus(directory: Path, megabytes: int) -> list[Path]:
    """Half of the documents as JSON lines, half as lines of text."""
    paths = [directory / "corpus.jsonl", directory / "corpus.txt"]
    with open(paths[0], "w") as lines, open(paths[1], "w") as text:
        for number, document in enumerate(documents(megabytes)):
            if number % 2:
                lines.write(json.dumps({"text": document}) + "\n")
            else:
                text.write(document + "\n")
    return paths


def memory(processes: list[int]) -> int:
    """Proportional set size of processes in bytes; those that have ended count nothing."""
    total = 0
    for process in processes:
        try:
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) << 10
    return total


def family(process: int) -> list[int]:
    """A process and its children, and theirs."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [process, *(member for child in children for member in family(int(child)))]


class Run:
    """One `nexa data prepare` process, watched."""

    def __init__(self, command: list[str], limit: int) -> None:
        self.peak, self._limit = 0, limit
        self.process = subprocess.Popen(command, start_new_session=True)

    def watch(self, doomed: Callable[[], bool] = lambda: False) -> bool:
        """Wait until it ends (True), or kill it as soon as it is `doomed` (False)."""
        while self.process.poll() is None:
            used = memory(family(self.process.pid))
            self.peak = max(self.peak, used)
            if used > self._limit or doomed():
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
                if used > self._limit:
                    raise SystemExit(f"{used >> 20} MiB in use, more than --memory-mb {self._limit >> 20}")
                return False
            time.sleep(POLL_SECONDS)
        if self.process.returncode:
            raise SystemExit(f"nexa data prepare ended with code {self.process.returncode}")
        return True


def written(store: Path) -> int:
    """Bytes of tokens in a store, finished or not."""
    return sum(path.stat().st_size for path in store.glob("*.bin"))


def digests(store: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(store.iterdir())}


def library_rates(tokenizer: Path, megabytes: int, workers: int) -> tuple[float, float]:
    """MB per second, and per second of CPU time, of the library in a process of its own with `workers` threads."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[3])\n"
        "from prepare import documents\n"
        "from tokenizers import Tokenizer\n"
        "texts = list(documents(int(sys.argv[2])))\n"
        "tokenizer = Tokenizer.from_file(sys.argv[1])\n"
        "size = sum(map(len, texts)) / 1e6\n"
        "start, cpu = time.perf_counter(), time.process_time()\n"
        "tokenizer.encode_batch_fast(texts)\n"
        "print(size / (time.perf_counter() - start), size / (time.process_time() - cpu))\n"
    )
    environment = os.environ | {"RAYON_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": "true"}
    words = [sys.executable, "-c", code, str(tokenizer), str(megabytes), str(Path(__file__).parent)]
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
    wall, cpu = map(float, done.stdout.split())
    return wall, cpu


def cpu_of_children() -> float:
    """Seconds of CPU time of all processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Make the corpus, prepare it unbroken and killed, compare, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mb", type=int, default=100, help="text of the corpus (default 100)")
    parser.add_argument("--memory-mb", type=int, default=1024, help="limit for all processes together (default 1024)")
    parser.add_argument("--kills", type=int, default=5, help="default 5")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: usable cores")
    parser.add_argument("--vocabulary", type=int, default=8000, help="size of the BPE (default 8000)")
    parser.add_argument("--dedup", choices=["exact", "near"], help="remove duplicates, too")
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary directory)")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="nexa-prepare-", dir=arguments.dir))
    try:
        print(json.dumps(measure(arguments, directory), indent=1))
    finally:
        shutil.rmtree(directory)


def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, object]:
    """All figures."""
    from data_pipeline.tokenizer import train_bpe

    paths = write_corpus(directory, arguments.size_mb)
    train_bpe(documents(8), arguments.vocabulary).save(directory)
    size = sum(path.stat().st_size for path in paths)

    def command(out: str) -> list[str]:
        words = [directory / "tokenizer.json", directory / out, arguments.workers, arguments.dedup or "", *paths]
        return [sys.executable, "-c", PROGRAM, *map(str, words)]

    limit = arguments.memory_mb << 20
    start, before = time.perf_counter(), cpu_of_children()
    whole = Run(command("whole"), limit)
    whole.watch()
    seconds, cpu_seconds = time.perf_counter() - start, cpu_of_children() - before
    library = library_rates(directory / "tokenizer.json", min(LIBRARY_MB, arguments.size_mb), arguments.workers)
    kills, peak, share = 0, whole.peak, written(directory / "whole") / (arguments.kills + 1)
    while True:
        run = Run(command("killed"), limit)
        bound = share * (kills + 1) if kills < arguments.kills else float("inf")
        finished = run.watch(lambda bound=bound: written(directory / "killed") >= bound)
        peak = max(peak, run.peak)
        if finished:
            break
        kills += 1
    if kills < arguments.kills:
        raise SystemExit(f"only {kills} kills came before the end; take a larger --size-mb")
    if digests(directory / "whole") != digests(directory / "killed"):
        raise SystemExit("the store of the killed run differs")
    manifest = json.loads((directory / "whole" / "manifest.json").read_text())
    text = (manifest["text_bytes"] + manifest["removed_bytes"]) / 1e6
    return {
        "corpus_mb": round(size / 1e6, 1),
        "tokens": manifest["tokens"],
        "workers": arguments.workers,
        "kills": kills,
        "byte_identical": True,
        "peak_mib": peak >> 20,
        "limit_mib": arguments.memory_mb,
        "mb_per_second": round(text / seconds, 2),
        "library_mb_per_second": round(library[0], 2),
        "ratio": round(text / seconds / library[0], 3),
        "mb_per_cpu_second": round(text / cpu_seconds, 2),
        "library_mb_per_cpu_second": round(library[1], 2),
        "cpu_ratio": round(text / cpu_seconds / library[1], 3),
    }


if __name__ == "__main__":
    main()
