"""What a run shows and keeps: a table in the terminal, a CSV file, TensorBoard's files."""

from __future__ import annotations

import csv
import math
import textwrap
from numbers import Integral
from pathlib import Path

from ..agent import Agent
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
_ROWS, _HEADER_EVERY = 30, 40


def number(value: float, width: int = 9) -> str:
    """Return a number with four significant digits, or as many as fit into ``width`` characters.

    Whole numbers and what is above a thousand are written out where they fit.

    Example:
        >>> [number(x) for x in (0.0152, 21.4, 27648, 1234.5, -1.5e9)]
        ['0.01520', '21.40', '27,648', '1,234', '-1.50e+09']
        >>> number(0.000123456, width=5)
        '1e-04'

    """
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, Integral) or abs(value) >= 999.95:
        forms = [",.0f", ".0f", ".3e"]
    else:
        forms = ["#.4g" if value else ".1f", "#.3g"]
    texts = [format(value, form) for form in (*forms, ".2e", ".1e", ".0e")]
    return next((text for text in texts if len(text) <= width), texts[-1])


def entry(title: str, text: object) -> str:
    """Return a titled entry of a report: within 80 columns, but a path is not broken."""
    if isinstance(text, Path):
        return f"{title:<16}{text}"
    return textwrap.fill(
        str(text),
        80,
        initial_indent=f"{title:<16}",
        subsequent_indent=" " * 16,
        break_long_words=False,
        break_on_hyphens=False,
    )


class Table:
    """Prints aligned rows of 80 columns, above the progress bar.

    Args:
        every: updates per row. By default about thirty rows are printed for each call of
            :meth:`Agent.learn`, at equal distances: the log says how far it is. The first and the
            last update always have a row. Where another callback ends the training, or an
            interrupt, :meth:`finish` prints the last one.

    """

    def __init__(self, every: int | None = None) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every = every
        self.rows = 0
        self._part = -1  # of the thirty, that had its row
        self._last: Log | None = None  # an update that had none

    def __call__(self, agent: Agent, log: Log) -> None:  # noqa: ARG002 # the protocol's
        """Print a row if one is due."""
        progress, self._last = log["time/progress"], log
        if self.every is None:
            part = math.floor(_ROWS * progress)
            due, self._part = part != self._part, part
        else:
            due = log["time/iterations"] % self.every == 0
        if due or progress >= 1:
            self.finish()

    def finish(self) -> None:
        """Print the row of the last update, unless it was printed."""
        from tqdm import tqdm

        if self._last is None:
            return
        if self.rows % _HEADER_EVERY == 0:
            self._shown = [column for column in _COLUMNS if column[1] in self._last]
            tqdm.write("".join(title.rjust(width) for title, _, width in self._shown))
        cells = (self._cell(self._last, key, width) for _, key, width in self._shown)
        tqdm.write("".join(cells))
        self.rows += 1
        self._last = None

    @staticmethod
    def _cell(log: Log, key: str, width: int) -> str:
        value = log.get(key, "-")
        if key.startswith("rollout/") and math.isnan(value):
            value = "-"  # no episode has ended yet
        text = value[: width - 1] if isinstance(value, str) else number(value, width - 1)
        return text.rjust(width)


class CSVLog:
    """Writes every log entry to a CSV file, one row per update.

    A key that appears later gets a column of its own, empty in the rows before.

    Args:
        path: the file. Its folder is made, and rows are added to a file that exists.

    """

    def __init__(self, path: str | Path) -> None:
        self.path = writable(path)

    def __call__(self, agent: Agent, log: Log) -> None:  # noqa: ARG002 # the protocol's
        """Append a row."""
        columns = self._columns()
        new = [key for key in log if key not in columns]
        if new and columns:
            self._widen(columns + new)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=columns + new)
            if not columns:
                writer.writeheader()
            writer.writerow(log)

    def _columns(self) -> list[str]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return next(csv.reader(file), [])

    def _widen(self, columns: list[str]) -> None:
        with self.path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=columns)
            writer.writeheader()
            writer.writerows(rows)


class TensorBoardLog:
    """Writes every number of the log to TensorBoard's files.

    Args:
        folder: the folder of these files, which is made.

    Raises:
        ModuleNotFoundError: the extra ``torch-trustregion[tensorboard]`` is not installed.

    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'TensorBoardLog needs tensorboard: pip install "torch-trustregion[tensorboard]"',
                name="tensorboard",
            ) from error
        self._writer = SummaryWriter(folder)

    def __call__(self, agent: Agent, log: Log) -> None:
        """Write the numbers at the agent's step."""
        for key, value in log.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(key, value, agent.num_timesteps)
        self._writer.flush()


def writable(path: str | Path) -> Path:
    """Return the path of a file that is to be written, and make its folder.

    Raises:
        ValueError: it is a folder.

    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def read_csv(path: Path) -> dict[str, list[float]]:
    """Return the numeric columns of a file written by :class:`CSVLog`; NaN where a row has none."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns: dict[str, list[float]] = {}
    for key in rows[0] if rows else ():
        try:
            columns[key] = [float(row[key] or math.nan) for row in rows]
        except ValueError:  # a column of words, such as the status
            continue
    return columns
