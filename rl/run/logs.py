"""What a run shows and keeps: a table in the terminal, a CSV file, TensorBoard's files."""

from __future__ import annotations

import csv
import io
import math
import os
import textwrap
import warnings
from contextlib import suppress
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

from ..agent import Agent
from ..files import replace_file
from ..options import check_counts
from ..reports import Log

_COLUMNS = (  # title, key, width: 80 in all; each cell is at least one narrower
    ("steps", "time/total_timesteps", 9),
    ("return", "rollout/ep_rew_mean", 9),
    ("length", "rollout/ep_len_mean", 7),
    ("KL", "train/kl_divergence_loss", 9),
    ("rho", "trust/rho", 6),
    ("cg", "trust/cg_iterations", 4),
    ("back", "trust/backtracks", 5),
    ("vf loss", "train/value_loss", 9),
    ("steps/s", "time/fps", 8),
    ("step", "trust/status", 14),
)
_ITERATION = "time/iterations"
_fill = partial(
    textwrap.fill, subsequent_indent=16 * " ", break_long_words=False, break_on_hyphens=False
)


def number(value: float, width: int = 9) -> str:
    """Return a number with four significant digits, or as many as fit into ``width`` characters.

    Whole numbers and what is above a thousand are written out where they fit.

    >>> [number(x) for x in (0.0152, 21.4, 27648, 1234.5, -1.5e9)]
    ['0.01520', '21.40', '27,648', '1,234', '-1.50e+09']
    """
    if not math.isfinite(value):
        return str(value)
    whole = isinstance(value, Integral) or abs(value) >= 999.95
    forms = (",.0f", ".0f", ".3e") if whole else ("#.4g" if value else ".1f", "#.3g")
    texts = [format(value, form) for form in (*forms, ".2e", ".1e", ".0e")]
    return next((text for text in texts if len(text) <= width), texts[-1])


def entry(title: str, text: object) -> str:
    """Return a titled entry of a report: within 80 columns, but a path is not broken."""
    head = f"{title:<16}"
    return f"{head}{text}" if isinstance(text, Path) else _fill(str(text), 80, initial_indent=head)


class Table:
    """Prints a row of 80 columns every so many updates, by default about thirty rows per training.

    The first update has a row, and the last one; where a callback or an interrupt ends the
    training, :meth:`finish` prints that.
    """

    def __init__(self, every: int | None = None) -> None:
        check_counts(every=every)
        self.every, self.rows = every, 0
        self._part = -1  # of thirty, that had its row
        self._last: Log | None = None  # an update that had none

    def __call__(self, agent: Agent, log: Log) -> None:  # noqa: ARG002 # the protocol's
        """Print a row if one is due."""
        progress, self._last = log["time/progress"], log
        if self.every is None:
            part = math.floor(30 * progress)
            due, self._part = part != self._part, part
        else:
            due = log["time/iterations"] % self.every == 0
        if due or progress >= 1:
            self.finish()

    def finish(self) -> None:
        """Print the row of the last update, unless it was printed."""
        from tqdm import tqdm

        log, self._last = self._last, None
        if log is None:
            return
        if self.rows % 40 == 0:
            self._shown = [column for column in _COLUMNS if column[1] in log]
            tqdm.write("".join(title.rjust(width) for title, _, width in self._shown))
        tqdm.write("".join(_cell(log, key, width) for _, key, width in self._shown))
        self.rows += 1


def _cell(log: Log, key: str, width: int) -> str:
    value = log.get(key, "-")
    if key.startswith("rollout/") and math.isnan(value):
        value = "-"  # no episode has ended yet
    text = value[: width - 1] if isinstance(value, str) else number(value, width - 1)
    return text.rjust(width)


class CSVLog:
    """Writes every log to a CSV file, one row per update, after the rows of a file that exists.

    A key that appears later gets a column of its own, empty in the rows before. In a run that is
    resumed, the rows of updates that are made again are replaced.

    Args:
        path: the file.
        strict: raise where it cannot be written, as on a full disk; otherwise warn, go on, and
            write the rows that are missing when it can be.

    """

    def __init__(self, path: str | Path, strict: bool = True) -> None:
        self.path, self.strict = writable(path), strict
        self._columns = [key for row in _rows(self.path)[:1] for key in row]
        self._waiting: list[Log] = []
        self._resumed = False

    def __call__(self, agent: Agent, log: Log) -> None:  # noqa: ARG002 # the protocol's
        """Append a row."""
        self._waiting.append(log)
        try:
            self._write()
        except OSError as error:
            if self.strict:
                self._waiting.clear()
                raise
            warnings.warn(f"the log is not written, the training goes on: {error}", stacklevel=2)

    def _write(self) -> None:
        columns = list(dict.fromkeys([*self._columns, *(k for log in self._waiting for k in log)]))
        if columns == self._columns and not self._resumed and self.path.exists():
            _append(self.path, columns, self._waiting)
        else:  # another header or fewer rows need another file
            first = self._waiting[0].get(_ITERATION, math.inf) if self._resumed else math.inf
            before = [row for row in _rows(self.path) if float(row.get(_ITERATION) or 0) < first]
            _replace(self.path, columns, [*before, *self._waiting])
        self._columns, self._waiting, self._resumed = columns, [], False

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the file says it all."""
        return {}

    def load_state_dict(self, _: dict[str, Any]) -> None:
        """Go on with the file of a run that is resumed."""
        self._resumed = True


def _append(path: Path, columns: list[str], rows: list[Log]) -> None:
    """Append whole rows, or none."""
    size = path.stat().st_size
    try:
        with path.open("a", newline="") as file:
            csv.DictWriter(file, columns).writerows(rows)
    except BaseException:
        os.truncate(path, size)
        raise


def _replace(path: Path, columns: list[str], rows: list[Any]) -> None:
    """Write another file and put it in the place of the old one."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, lambda file: file.write(text.getvalue().encode()))


class TensorBoardLog:
    """Writes every number of the log to TensorBoard's files in a folder, which is made."""

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ModuleNotFoundError as error:
            hint = 'TensorBoardLog needs tensorboard: pip install "torch-trustregion[tensorboard]"'
            raise ModuleNotFoundError(hint, name="tensorboard") from error
        self._writer = SummaryWriter(folder)

    def __call__(self, agent: Agent, log: Log) -> None:
        """Write the numbers at the agent's step."""
        for key, value in log.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(key, value, agent.num_timesteps)
        self._writer.flush()


def writable(path: str | Path) -> Path:
    """Return the path of a file that is to be written, and make its folder."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def read_csv(path: Path) -> dict[str, list[float]]:
    """Return the numeric columns of a file written by :class:`CSVLog`; NaN where a row has none."""
    rows = _rows(path)
    columns: dict[str, list[float]] = {}
    for key in rows[0] if rows else ():
        with suppress(ValueError):  # of a column of words, such as the status
            columns[key] = [float(row[key] or math.nan) for row in rows]
    return columns


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
