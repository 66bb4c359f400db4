"""Plots of runs: returns over seeds, and the KL of each update under its bound."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .logs import read_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_STEPS = "time/total_timesteps"
_RETURN, _KL = "rollout/ep_rew_mean", "train/kl_divergence_loss"


def iqm(scores: np.ndarray) -> np.ndarray:
    """Return the interquartile mean over the first axis: the mean of the middle half.

    Where a quarter of the scores is not a whole number, the scores at its edges count in part, so
    that the mean of three is that of the middle one and half a share of each neighbour.

    References:
        Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice, 2021.

    Example:
        >>> iqm(np.array([0.0, 1.0, 2.0, 100.0])).item()
        1.5

    """
    n = len(scores)
    ordered = np.sort(scores, axis=0)
    edges = np.arange(n + 1)
    weights = np.clip(np.minimum(edges[1:], 0.75 * n) - np.maximum(edges[:-1], 0.25 * n), 0, None)
    return np.tensordot(weights / weights.sum(), ordered, axes=1)


def bootstrap_interval(
    scores: np.ndarray, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the percentile bootstrap interval of :func:`iqm` over the first axis.

    Args:
        scores: shape ``(runs, ...)``.
        level: of confidence.
        draws: how many resamples.
        seed: of the resampling.

    """
    rows = np.random.default_rng(seed).integers(len(scores), size=(draws, len(scores)))
    means = np.stack([iqm(scores[chosen]) for chosen in rows])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def run_label(folder: Path) -> str:
    """Return what to call a run: its algorithm and environment, or its folder's name."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return f"{config['algorithm']} on {config['env_id']}"
    except (OSError, ValueError, KeyError):
        return folder.name


def plot_runs(folders: Sequence[Path], path: Path) -> dict[str, int]:
    """Draw the returns of runs, and their KL relative to delta, against environment steps.

    Runs of one algorithm on one environment are seeds: their interquartile mean is drawn with its
    bootstrap interval, and each of them thinly.

    Args:
        folders: run folders, as ``python -m rl train`` leaves them.
        path: PNG file to write.

    Returns:
        How many runs each label has.

    Raises:
        ValueError: no folder, or one without ``progress.csv``.

    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no display
    from matplotlib.figure import Figure

    if not folders:
        raise ValueError("no run folders to plot")
    groups: dict[str, list[dict[str, list[float]]]] = {}
    for folder in folders:
        log = folder / "progress.csv"
        if not log.exists():
            raise ValueError(f"{folder} is no run folder: it has no progress.csv")
        columns = read_csv(log)
        missing = [key for key in (_STEPS, _RETURN, _KL) if not columns.get(key)]
        if missing:
            raise ValueError(f"{log} has no {', '.join(missing)}: it is empty, or no log of a run")
        groups.setdefault(run_label(folder), []).append(columns)
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for i, (label, runs) in enumerate(groups.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        _draw_returns(above, label, runs, colour)
        _draw_kl(below, runs, colour)
    above.set_ylabel("mean return of the last\n100 training episodes")
    above.legend(frameon=False, fontsize="small")
    below.axhline(1.0, linestyle="--", color="0.4", linewidth=1)
    below.set(
        xlabel="environment steps", ylabel="KL of an update\nrelative to delta", ylim=(0, None)
    )
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return {label: len(runs) for label, runs in groups.items()}


def _draw_returns(
    axes: Axes, label: str, runs: Sequence[Mapping[str, list[float]]], colour: str
) -> None:
    curves = [(np.array(r[_STEPS]), np.array(r[_RETURN])) for r in runs]
    for steps, returns in curves:
        axes.plot(steps, returns, color=colour, linewidth=0.7, alpha=0.4 if len(runs) > 1 else 1)
    if len(runs) == 1:
        axes.plot([], [], color=colour, label=label)
        return
    # where all have a return: before the first episode ends there is none
    known = [(s[np.isfinite(r)], r[np.isfinite(r)]) for s, r in curves]
    if not all(len(s) for s, _ in known):
        axes.plot([], [], color=colour, label=f"{label}: a run ended no episode")
        return
    start, end = max(s[0] for s, _ in known), min(s[-1] for s, _ in known)
    grid = np.linspace(start, end, 200)
    scores = np.stack([np.interp(grid, s, r) for s, r in known])
    low, high = bootstrap_interval(scores)
    axes.plot(grid, iqm(scores), color=colour, linewidth=2, label=f"{label}, IQM of {len(runs)}")
    axes.fill_between(grid, low, high, color=colour, alpha=0.2, linewidth=0)


def _draw_kl(axes: Axes, runs: Sequence[Mapping[str, list[float]]], colour: str) -> None:
    for run in runs:
        bounds = run.get("trust/delta", [math.nan] * len(run[_KL]))
        shares = [
            kl / d if math.isfinite(d) else math.nan for kl, d in zip(run[_KL], bounds, strict=True)
        ]
        axes.plot(run[_STEPS], shares, ".", color=colour, markersize=3)
