"""Plots of runs: returns, over seeds where there are several, and the KL of each update."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from .logs import read_csv, writable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Columns: TypeAlias = Mapping[str, Sequence[float]]

_STEPS, _DELTA = "time/total_timesteps", "trust/delta"
_RETURN, _KL = "rollout/ep_rew_mean", "train/kl_divergence_loss"


class _Style(NamedTuple):
    """How a group of runs is drawn; groups differ in black and white, too."""

    color: str
    linestyle: str
    marker: str


_STYLES = (
    _Style("#0072b2", "-", "o"),
    _Style("#d55e00", "--", "s"),
    _Style("#009e73", "-.", "^"),
    _Style("#cc79a7", ":", "D"),
    _Style("#e69f00", "-", "v"),
    _Style("#56b4e9", "--", "P"),
    _Style("#000000", "-.", "X"),
)
_BOUND: dict[str, Any] = {"linestyle": "--", "color": "0.2", "linewidth": 1}


def iqm(scores: np.ndarray) -> np.ndarray:
    """Return the interquartile mean over the first axis, as the package rliable defines it.

    Of n scores, the n // 4 lowest and the n // 4 highest are left out, and the rest is averaged.
    Fewer than four scores have their ordinary mean.

    References:
        Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice, 2021.

    Example:
        >>> iqm(np.array([0.0, 1.0, 2.0, 100.0])).item()
        1.5

    """
    cut = len(scores) // 4
    return np.sort(scores, axis=0)[cut : len(scores) - cut].mean(axis=0)


def bootstrap_interval(
    scores: np.ndarray, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the percentile bootstrap interval of :func:`iqm` over the first axis.

    Args:
        scores: shape ``(runs, ...)``.
        level: level of confidence.
        draws: number of resamples.
        seed: seed of the resampling.

    """
    rows = np.random.default_rng(seed).integers(len(scores), size=(draws, len(scores)))
    means = np.stack([iqm(scores[chosen]) for chosen in rows])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def plot_learning_curve(
    log: str | Path | Columns, path: str | Path = "learning_curve.png", *, title: str = ""
) -> None:
    """Draw the returns of one run, and the KL of its updates, against environment steps.

    Args:
        log: a run folder, the file of a :class:`CSVLog`, or its columns by name.
        path: file to write, such as a PNG.
        title: what the run was.

    Raises:
        ValueError: no log of a run.

    """
    _draw({"": [log if isinstance(log, Mapping) else _read(Path(log))]}, path, title)


def plot_runs(folders: Sequence[str | Path], path: str | Path) -> dict[str, int]:
    """Draw the returns of runs, and the KL of their updates, against environment steps.

    Runs whose options differ in nothing but the seed form a group: their interquartile mean is
    drawn with its bootstrap interval, and each of them thinly. The label of a group names the
    options in which it differs from others of the same algorithm and environment.

    Args:
        folders: run folders, as ``python -m rl train`` leaves them.
        path: file to write, such as a PNG.

    Returns:
        The number of runs of each label.

    Raises:
        ValueError: no folder, or one without ``progress.csv``.

    """
    if not folders:
        raise ValueError("no run folders to plot")
    runs = [_read(Path(folder)) for folder in folders]
    groups: dict[str, list[Columns]] = {}
    for label, run in zip(_labels([Path(folder) for folder in folders]), runs, strict=True):
        groups.setdefault(label, []).append(run)
    _draw(groups, path)
    return {label: len(runs) for label, runs in groups.items()}


def _read(log: Path) -> Columns:
    file = log / "progress.csv" if log.is_dir() else log
    if not file.exists():
        what = f"{log} is no run folder: it has no progress.csv" if log.is_dir() else f"no {log}"
        raise ValueError(what)
    columns = read_csv(file)
    missing = [key for key in (_STEPS, _RETURN, _KL) if not columns.get(key)]
    if missing:
        raise ValueError(f"{file} has no {', '.join(missing)}: it is empty, or no log of a run")
    return columns


def _labels(folders: Sequence[Path]) -> list[str]:
    """Return what to call each run: the same for runs that differ in the seed alone."""
    configs = [_config(folder) for folder in folders]
    kin: dict[str, list[dict[str, Any]]] = {}
    for config in configs:
        kin.setdefault(config["name"], []).append(config)
    labels: list[str] = []
    for config in configs:
        differing = [
            f"{key}={config.get(key)}"
            for key in dict.fromkeys(key for other in kin[config["name"]] for key in other)
            if any(other.get(key) != config.get(key) for other in kin[config["name"]])
        ]
        labels.append(", ".join([config["name"], *differing]))
    return labels


def _config(folder: Path) -> dict[str, Any]:
    """Return the options of a run without its seed, and its ``name``; that alone, if unknown."""
    try:
        config = json.loads((folder / "config.json").read_text())
        config["name"] = f"{config['algorithm']} on {config['env_id']}"
    except (OSError, ValueError, KeyError, TypeError):
        return {"name": str(folder)}
    return {key: value for key, value in config.items() if key != "seed"}


def _draw(groups: Mapping[str, Sequence[Columns]], path: str | Path, title: str = "") -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no display
    from matplotlib.figure import Figure

    path = writable(path)
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for (label, runs), style in zip(groups.items(), cycle(_STYLES), strict=False):
        _draw_returns(above, textwrap.fill(label, 50), runs, style)
    _draw_kl(below, groups)
    if not any(math.isfinite(x) for runs in groups.values() for run in runs for x in run[_RETURN]):
        above.text(0.5, 0.5, "no episode finished", transform=above.transAxes, ha="center")
    above.set_title(title, loc="left")
    above.set_ylabel("mean return of the last\n100 training episodes")
    below.set_ylabel("KL(old || new)\nof each update [nats]")
    below.set_xlabel("environment steps")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if any(axes.get_legend_handles_labels()[1] for axes in (above, below)):
        # below both, where no curve can be
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def _draw_returns(axes: Axes, label: str, runs: Sequence[Columns], style: _Style) -> None:
    curves = [(np.array(r[_STEPS], float), np.array(r[_RETURN], float)) for r in runs]
    # before the first episode ends there is no return
    curves = [(s[np.isfinite(r)], r[np.isfinite(r)]) for s, r in curves]
    if len(curves) == 1:
        _draw_line(axes, *curves[0], label, style)
        return
    for steps, returns in curves:
        alone = style.marker if len(steps) == 1 else None  # a line needs two points to be seen
        axes.plot(steps, returns, color=style.color, linewidth=0.7, alpha=0.4, marker=alone)
    known = [curve for curve in curves if len(curve[0])]
    start = max([s[0] for s, _ in known], default=0.0)
    end = min([s[-1] for s, _ in known], default=0.0)
    if len(known) < len(curves) or end < start:
        why = "a run ended no episode" if len(known) < len(curves) else "no steps in common"
        axes.plot([], [], color=style.color, label=f"{label}: {why}")
        return
    grid = np.linspace(start, end, 200 if end > start else 1)
    scores = np.stack([np.interp(grid, s, r) for s, r in known])
    low, high = bootstrap_interval(scores)
    _draw_line(axes, grid, iqm(scores), f"{label}, IQM of {len(runs)}", style)
    axes.fill_between(grid, low, high, color=style.color, alpha=0.2, linewidth=0)


def _draw_line(axes: Axes, x: np.ndarray, y: np.ndarray, label: str, style: _Style) -> None:
    every = max(1, len(x) // 10)
    axes.plot(x, y, label=label, linewidth=2, markevery=every, markersize=5, **style._asdict())


def _draw_kl(axes: Axes, groups: Mapping[str, Sequence[Columns]]) -> None:
    """Draw KLs on a logarithmic scale, and a mark at its edge for what lies beyond it."""
    runs = [run for group in groups.values() for run in group]
    deltas = [np.array(run.get(_DELTA, ()), float) for run in runs]
    sizes = np.concatenate([*deltas, *(np.array(run[_KL], float) for run in runs)])
    sizes = sizes[(sizes > 0) & (sizes < math.inf)]
    high = 2 * max(sizes, default=1e-2)
    low = min(high / 40, max(min(sizes, default=1e-2) / 2, high / 1e6))
    axes.set(yscale="log", ylim=(low, high))
    marks = {"v": "KL below the axis, such as 0", "^": "KL above the axis"}
    for group, style in zip(groups.values(), cycle(_STYLES), strict=False):
        for run in group:
            steps, kl = np.array(run[_STEPS], float), np.array(run[_KL], float)
            axes.plot(steps, kl, style.marker, color=style.color, markersize=3, alpha=0.7)
            for mark, beyond, y in (("v", kl < low, 0.04), ("^", kl > high, 0.96)):
                if beyond.any():
                    x, heights = steps[beyond], np.full(beyond.sum(), y)  # as shares of the axis
                    line = axes.plot(x, heights, mark, color=style.color, fillstyle="none")[0]
                    line.set(transform=axes.get_xaxis_transform(), label=marks.pop(mark, ""))
    bounds = [delta[np.isfinite(delta)] for delta in deltas]
    constant = {bound[0] for bound in bounds if len(bound) and np.ptp(bound) == 0}
    lines = [axes.axhline(bound, **_BOUND) for bound in sorted(constant)]
    for run, delta, bound in zip(runs, deltas, bounds, strict=True):
        if len(bound) and np.ptp(bound) > 0:
            lines += axes.plot(run[_STEPS], delta, **_BOUND)
    if lines:
        lines[0].set_label("delta")
