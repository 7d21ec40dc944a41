"""A folder that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nexa.checkpoint import files
from nexa.errors import UserError


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A directory to write into, which becomes `path` at the end and is removed after an exception.

    Raises UserError when `path` exists (an empty directory is fine) and for every OSError of the writing.
    """
    check_free(path)
    aside = path.with_name(f"{path.name}.{secrets.token_hex(6)}{files.TMP_SUFFIX}")
    try:
        try:
            aside.mkdir(parents=True)
            yield aside
            files.fsync_directory(aside)
            os.rename(aside, path)
            files.fsync_directory(path.parent)
        except BaseException:
            if aside.is_dir():
                files.discard(aside)
            raise
    except OSError as error:
        where = "" if error.filename is None else f": {error.filename}"
        hint = "; free space or choose another disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise UserError(f"{path}: cannot be written ({error.strerror}{where}){hint}; nothing was left there") from None


def check_free(path: Path) -> None:
    """Raises UserError when there is something at `path` already."""
    try:
        taken = any(path.iterdir()) if path.is_dir() else path.exists() or path.is_symlink()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if taken:
        what = "exists and is not empty" if path.is_dir() else "exists and is not a directory"
        raise UserError(f"{path}: {what}; nothing is overwritten: name a new folder, or remove this one")
