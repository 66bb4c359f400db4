"""The folder of a run: its options, its log, its checkpoints, and the process that writes there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from .. import checkpoint
from ..files import replace_file

T = TypeVar("T")
CHECKPOINT, BEFORE, BEST = "checkpoint.zip", "checkpoint-before.zip", "best.zip"
LOG, CURVE, CONFIG = "progress.csv", "learning_curve.png", "config.json"


def new_folder(env_id: str, name: str) -> Path:
    """Make ``runs/ENV_ID/NAME-TIME``; runs that start at the same time get a number, too."""
    # not every system allows other characters, or dots at the ends
    env = [re.sub(r"[^\w.-]", "-", part).strip(".") for part in env_id.split("/")]
    first = path = Path("runs", *env, f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
    number = 1
    while True:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1
            path = first.with_name(f"{first.name}-{number}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a folder.

    Raises:
        ValueError: one does already.

    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", timeout=0)
    try:
        with lock:
            yield
    except Timeout as error:
        raise ValueError(f"another process is training in {folder}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Return what ``config.json`` says of a run.

    Raises:
        ValueError: there is none, or it is damaged.

    """
    try:
        config = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is not a run folder: it has no {CONFIG}") from error
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is damaged: {error}") from error
    if not (isinstance(config, dict) and {"algorithm", "env_id"} <= config.keys()):
        raise ValueError(f"{folder / CONFIG} does not name an algorithm and an environment")
    return config


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write ``config.json``, whole or not at all."""
    text = json.dumps(config, indent=2).encode()
    replace_file(folder / CONFIG, lambda file: file.write(text))


def load_newest(folder: Path, load: Callable[[Path], T]) -> tuple[T, Path, list[str]]:
    """Load the newest good checkpoint of a run; say which it is, and what is wrong with others.

    Raises:
        CheckpointError: none is.

    """
    return checkpoint.load_newest((folder / CHECKPOINT, folder / BEFORE), load)
