"""What a run shows and keeps: a table in the terminal, a CSV file, a learning curve."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from ..agent import Agent, Log

_COLUMNS = (  # title, key, width, format
    ("steps", "time/total_timesteps", 9, ",d"),
    ("return", "rollout/ep_rew_mean", 9, ".1f"),
    ("length", "rollout/ep_len_mean", 8, ".1f"),
    ("KL", "train/kl_divergence_loss", 9, ".5f"),
    ("rho", "trust/rho", 6, ".2f"),
    ("cg", "trust/cg_iterations", 4, "d"),
    ("back", "trust/backtracks", 5, "d"),
    ("value loss", "train/value_loss", 11, ".4g"),
    ("steps/s", "time/fps", 9, ",.0f"),
    ("step", "trust/status", 15, "s"),
)
_HEADER_EVERY = 25


class Table:
    """Prints one aligned row every ``every`` updates, above the progress bar."""

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self.rows = 0

    def __call__(self, agent: Agent, log: Log) -> None:  # noqa: ARG002 # the protocol's
        """Print a row, and the header from time to time."""
        from tqdm import tqdm

        if log["time/iterations"] % self.every:
            return
        if self.rows % _HEADER_EVERY == 0:
            tqdm.write("".join(title.rjust(width) for title, _, width, _ in _COLUMNS))
        cells = (  # an algorithm without a search has nothing to say of one
            (format(log[key], form) if key in log else "-").rjust(width)
            for _, key, width, form in _COLUMNS
        )
        tqdm.write("".join(cells))
        self.rows += 1


class CSVLog:
    """Writes every log entry to a CSV file, one row an update.

    A key that comes up later gets a column of its own, empty before.

    Args:
        path: the file; rows are added to one that exists.

    """

    def __init__(self, path: Path) -> None:
        self.path = path

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
        folder: where they go.

    Raises:
        ModuleNotFoundError: the extra ``torch-trustregion[tensorboard]`` is not installed.

    """

    def __init__(self, folder: Path) -> None:
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


def plot_learning_curve(columns: dict[str, list[float]], path: Path, *, title: str) -> None:
    """Draw return and KL against environment steps, the KL under its bound.

    Args:
        columns: as :func:`read_csv` returns them.
        path: PNG file to write.
        title: what the run was.

    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no display
    from matplotlib.figure import Figure

    steps = columns["time/total_timesteps"]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    returns = columns["rollout/ep_rew_mean"]
    marker = "o" if len(steps) < 10 else None  # a line needs two points to be seen
    above.plot(steps, returns, color="#0072b2", linewidth=2, marker=marker)
    if all(map(math.isnan, returns)):
        above.text(0.5, 0.5, "no episode finished", transform=above.transAxes, ha="center")
    above.set_ylabel("mean return of the last\n100 training episodes")
    above.set_title(title, loc="left")
    kl = columns["train/kl_divergence_loss"]
    below.plot(steps, kl, ".-", color="#0072b2", label="KL(old || new) of each update")
    bound = [d for d in columns.get("trust/delta", []) if math.isfinite(d)]
    if bound:
        below.axhline(bound[-1], linestyle="--", color="#d55e00", label="delta")
    below.set_ylim(0, 1.35 * max([x for x in (*kl, *bound) if math.isfinite(x)], default=1e-8))
    below.set_ylabel("KL [nats]")
    below.set_xlabel("environment steps")
    below.legend(loc="upper right", ncols=2, frameon=False)
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
