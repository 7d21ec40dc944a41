"""One process at a time."""

from __future__ import annotations

import fcntl
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive(path: Path, otherwise: str) -> Iterator[None]:
    """Wait until no other process holds the lock. The system frees that of a dead process, so it cannot go stale.

    Where the file system knows no locks, warn that `otherwise` happens: the work must allow for it.
    """
    with open(path, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError:
            warnings.warn(f"{path}: no file locks here; {otherwise}", stacklevel=2)
        yield
