"""Files that are replaced as a whole: after a crash there is the old one or the new one."""

from __future__ import annotations

import glob
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

_ABANDONED = 3600.0  # seconds; pids say nothing about processes on other machines


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside its destination, and move it there in one step once it is on disk.

    Temporary files of this destination that killed processes left are removed, an hour after they
    were last written to.

    Args:
        path: the destination; its folder is made.
        write: writes the contents to the binary file that it is given, which can be read, too.

    Raises:
        OSError: names the destination; what was there before is unchanged.

    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        try:
            with open(temporary, "x+b") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        words = f"cannot write {path}, which is as it was before: {error.strerror or error}"
        raise OSError(*filter(None, [error.errno]), words) from error
    with suppress(OSError):  # not every system can; the file itself is on disk
        _sync_folder(path.parent)


def _remove_abandoned(path: Path) -> None:
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):  # another process may remove it, too
            if time.time() - left.lstat().st_mtime > _ABANDONED:
                left.unlink()


def _sync_folder(folder: Path) -> None:
    """Have the folder's list of files on disk, too: without it a power cut may undo the move."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
