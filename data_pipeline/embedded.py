"""The embedded corpus: English prose and source code that every CPython carries, packed on first use.

Needs no network and no file in the repository. Documents are the sources of the standard library (without its tests
and its tables of characters), the docstrings of each module as prose, and the topics of `help()`.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import platform
import shutil
import sysconfig
import tempfile
import tokenize
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from data_pipeline.indexed import dtype_for
from data_pipeline.locks import exclusive
from data_pipeline.store import MANIFEST
from data_pipeline.tokenizer import MIN_BPE_VOCABULARY, train_bpe
from data_pipeline.workers import split_of
from data_pipeline.writer import StoreWriter
from nexa.errors import UserError

RECIPE = 1
"""Raise when the corpus is made another way: the name of the cached store follows."""
SOURCE_BYTES = 6_000_000
SAMPLE_BYTES = 2_000_000
VALIDATION_FRACTION = 0.05
MIN_PROSE = 200
"""Characters below which a module's docstrings are no document of their own."""
BATCH = 64
_SKIPPED_DIRECTORIES = {
    "__pycache__",
    "_bundled",
    "dist-packages",
    "encodings",
    "idle_test",
    "lib-dynload",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}


def embedded_store(cache_dir: str | None, vocab_size: int) -> Path:
    """Directory of the packed embedded corpus with a BPE of `vocab_size`, built on the first call.

    `cache_dir`: where to keep it (`data.cache_dir`); None is `$XDG_CACHE_HOME/nexa` or `~/.cache/nexa`. One Python
    version always gives the same store. Many processes may call at once: one builds, the others wait.
    Raises `UserError` for a vocabulary below 257 and a place that cannot be written.
    """
    if vocab_size < MIN_BPE_VOCABULARY:
        raise UserError(
            f"data.tokenizer_vocab_size: {vocab_size} (null takes it from model.vocab_size); the embedded corpus needs "
            f"at least {MIN_BPE_VOCABULARY}: 256 bytes and the end of text"
        )
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nexa"
    cache = Path(cache_dir).expanduser() if cache_dir else default
    recipe = f"{RECIPE} {SOURCE_BYTES} {SAMPLE_BYTES} {VALIDATION_FRACTION} {MIN_PROSE} {version('tokenizers')}"
    mark = hashlib.sha256(recipe.encode()).hexdigest()[:8]
    target = cache / f"embedded-{platform.python_version()}-{vocab_size}-{mark}"
    if (target / MANIFEST).is_file():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with exclusive(cache / f"{target.name}.lock", "every process packs the corpus itself"):
            if not (target / MANIFEST).is_file():
                _build(target, vocab_size)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: the embedded corpus cannot be packed in {cache} ({error.strerror or error}); "
            "name a directory that can be written"
        ) from None
    return target


def _build(target: Path, vocab_size: int) -> None:
    """Build aside and rename, so that the store is whole or not there; without locks the first rename wins."""
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        documents = embedded_documents()
        tokenizer = train_bpe(_bpe_sample(documents), vocab_size)
        tokenizer.save(aside)
        dtype = dtype_for(tokenizer.vocab_size)
        writer = StoreWriter(aside, dtype)
        for split in ("train", "validation"):
            texts = [text for part, text in documents if part == split]
            for first in range(0, len(texts), BATCH):
                writer.append(split, *tokenizer.encode_documents(texts[first : first + BATCH], dtype))
        writer.finish(tokenizer, {"name": "embedded", "sources": [f"CPython {platform.python_version()}"], "bad": 0})
        aside.chmod(0o755)  # mkdtemp's own mode would lock other users of a shared cache out
        try:
            os.rename(aside, target)
        except OSError:
            if not (target / MANIFEST).is_file():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def embedded_documents() -> list[tuple[str, str]]:
    """(split, text) of every document, in a fixed order.

    A module's docstrings go to the split of its source: validation text never occurs in training.
    Raises `UserError` when this Python carries no sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents, size = [], 0
    for path in sorted(_modules(root), key=lambda p: _digest(p.relative_to(root).as_posix())):
        if size >= SOURCE_BYTES:
            break
        try:
            with tokenize.open(path) as stream:  # honours an encoding declared in the file
                text = stream.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if not text.strip():
            continue
        split = split_of(text.encode(), VALIDATION_FRACTION)
        documents.append((split, text))
        prose = _docstrings(text)
        if len(prose) >= MIN_PROSE:
            documents.append((split, prose))
        size += len(text.encode())
    if not documents:
        raise UserError(
            f"data.source: embedded: this Python has no library sources in {root}; name a packed store instead"
        )
    for name, text in sorted(_topics().items()):
        documents.append((split_of(text.encode(), VALIDATION_FRACTION), f"{name}\n\n{text}"))
    return documents


def _modules(root: Path) -> Iterator[Path]:
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if name not in _SKIPPED_DIRECTORIES and not name.startswith("config-")]
        yield from (
            Path(directory, file) for file in files if file.endswith(".py") and not file.startswith("_sysconfigdata")
        )


def _docstrings(source: str) -> str:
    """All docstrings of a module, each under the name of what it describes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    parts = []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        text = ast.get_docstring(node, clean=False) if isinstance(node, kinds) else None
        if text:
            heading = "" if isinstance(node, ast.Module) else f"{getattr(node, 'name', '')}: "
            parts.append(heading + inspect.cleandoc(text))
    return "\n\n".join(parts)


def _topics() -> dict[str, str]:
    """Texts of `help()`; some distributions leave them out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return dict(topics)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _bpe_sample(documents: list[tuple[str, str]]) -> Iterator[str]:
    """Training documents in an order of their own, up to SAMPLE_BYTES."""
    size = 0
    for text in sorted((text for split, text in documents if split == "train"), key=_digest):
        if size >= SAMPLE_BYTES:
            return
        size += len(text.encode())
        yield text
