"""Plots of runs: returns, over seeds where there are several, and the KL of each update."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .logs import read_csv, writable

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class _Run(NamedTuple):
    steps: np.ndarray
    returns: np.ndarray
    kl: np.ndarray
    delta: np.ndarray  # may be empty


_KEYS = "time/total_timesteps", "rollout/ep_rew_mean", "train/kl_divergence_loss", "trust/delta"
_COLOURS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"
_LOOKS = zip(_COLOURS, cycle(("-", "--", "-.", ":")), "os^DvPX", strict=False)
_STYLES: list[dict[str, Any]] = [{"color": c, "linestyle": s, "marker": m} for c, s, m in _LOOKS]
_BOUND: dict[str, Any] = {"linestyle": "--", "color": "0.2", "linewidth": 1}


def iqm(scores: np.ndarray) -> np.ndarray:
    """Return the interquartile mean over the first axis, as the package rliable defines it.

    Of n scores, the n // 4 lowest and the n // 4 highest are left out: Agarwal et al., Deep
    Reinforcement Learning at the Edge of the Statistical Precipice, 2021.

    >>> iqm(np.array([0.0, 1.0, 2.0, 100.0])).item()
    1.5
    """
    cut = len(scores) // 4
    return np.sort(scores, axis=0)[cut : len(scores) - cut].mean(axis=0)


def bootstrap_interval(scores: np.ndarray, draws: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95% percentile bootstrap interval of :func:`iqm` over the first axis."""
    rows = np.random.default_rng(0).integers(len(scores), size=(draws, len(scores)))
    low, high = np.quantile([iqm(scores[chosen]) for chosen in rows], [0.025, 0.975], axis=0)
    return low, high


def plot_learning_curve(
    log: str | Path | Mapping[str, Sequence[float]],
    path: str | Path = "learning_curve.png",
    *,
    title: str = "",
) -> None:
    """Draw the returns of one run, and the KL of its updates, against environment steps.

    The log is a run folder, the file of a :class:`CSVLog`, or its columns by name.
    """
    _draw({"": [_run(log)]}, path, title)


def plot_runs(folders: Sequence[str | Path], path: str | Path) -> dict[str, int]:
    """Draw the same of run folders; return the number of runs of each label.

    Runs whose options differ in nothing but the seed form a group: their interquartile mean is
    drawn with its bootstrap interval, and each of them thinly. The label of a group names the
    options in which it differs from others of the same algorithm and environment.
    """
    if not folders:
        raise ValueError("no run folders to plot")
    groups: dict[str, list[_Run]] = {}
    for label, folder in zip(_labels([Path(folder) for folder in folders]), folders, strict=True):
        groups.setdefault(label, []).append(_run(folder))
    _draw(groups, path)
    return {label: len(runs) for label, runs in groups.items()}


def _run(log: str | Path | Mapping[str, Sequence[float]]) -> _Run:
    if isinstance(log, Mapping):
        name, columns = "the log", log
    else:
        name = Path(log) / "progress.csv" if Path(log).is_dir() else Path(log)
        if not name.exists():
            raise ValueError(f"there is no {name}")
        columns = read_csv(name)
    missing = [key for key in _KEYS[:3] if not columns.get(key)]
    if missing:
        raise ValueError(f"{name} has no {', '.join(missing)}: it is empty, or no log of a run")
    return _Run(*(np.array(columns.get(key, ()), float) for key in _KEYS))


def _labels(folders: Sequence[Path]) -> list[str]:
    """Return what to call each run: the same for runs that differ in the seed alone."""
    configs, labels = [_config(folder) for folder in folders], []
    for config in configs:
        kin = [other for other in configs if other["name"] == config["name"]]
        keys = dict.fromkeys(key for other in kin for key in other)
        values = {key: [other.get(key) for other in kin] for key in keys}
        differing = [k for k, v in values.items() if v.count(v[0]) < len(v)]
        labels.append(", ".join([config["name"], *(f"{k}={config.get(k)}" for k in differing)]))
    return labels


def _config(folder: Path) -> dict[str, Any]:
    """Return the options of a run without its seed, and its ``name``; that alone, if unknown."""
    try:
        config = json.loads((folder / "config.json").read_text())
        config["name"] = f"{config['algorithm']} on {config['env_id']}"
    except (OSError, ValueError, KeyError, TypeError):
        return {"name": str(folder)}
    changes = [each["changed"] for each in config.pop("resumed", [])]
    config |= {"resumed with": changes} if any(changes) else {}
    return {key: value for key, value in config.items() if key != "seed"}


def _draw(groups: Mapping[str, Sequence[_Run]], path: str | Path, title: str = "") -> None:
    from matplotlib.figure import Figure  # without pyplot, which would need a display

    path = writable(path)
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for (label, runs), style in zip(groups.items(), cycle(_STYLES), strict=False):
        _draw_returns(above, textwrap.fill(label, 50), runs, style)
    _draw_kl(below, groups)
    if not any(np.isfinite(run.returns).any() for runs in groups.values() for run in runs):
        above.text(0.5, 0.5, "no episode finished", transform=above.transAxes, ha="center")
    above.set_title(title, loc="left")
    above.set_ylabel("mean return of the last\n100 training episodes")
    below.set(ylabel="KL(old || new)\nof each update [nats]", xlabel="environment steps")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if any(axes.get_legend_handles_labels()[1] for axes in (above, below)):
        # below both, where no curve can be
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def _draw_returns(axes: Axes, label: str, runs: Sequence[_Run], style: dict[str, Any]) -> None:
    known = [np.isfinite(run.returns) for run in runs]  # before the first episode ends, none is
    curves = [(run.steps[k], run.returns[k]) for run, k in zip(runs, known, strict=True)]
    if len(curves) == 1:
        _draw_line(axes, *curves[0], label, style)
        return
    for steps, returns in curves:
        alone = style["marker"] if len(steps) == 1 else None  # a line needs two points to be seen
        axes.plot(steps, returns, color=style["color"], linewidth=0.7, alpha=0.4, marker=alone)
    ended = all(len(steps) for steps, _ in curves)
    start = max(steps[0] for steps, _ in curves) if ended else 0.0
    end = min(steps[-1] for steps, _ in curves) if ended else -1.0
    if end < start:
        why = "no steps in common" if ended else "a run ended no episode"
        axes.plot([], [], color=style["color"], label=f"{label}: {why}")
        return
    grid = np.linspace(start, end, 200 if end > start else 1)
    scores = np.stack([np.interp(grid, *curve) for curve in curves])
    _draw_line(axes, grid, iqm(scores), f"{label}, IQM of {len(runs)}", style)
    axes.fill_between(
        grid, *bootstrap_interval(scores), color=style["color"], alpha=0.2, linewidth=0
    )


def _draw_line(axes: Axes, x: np.ndarray, y: np.ndarray, label: str, style: dict[str, Any]) -> None:
    every = max(1, len(x) // 10)
    axes.plot(x, y, label=label, linewidth=2, markevery=every, markersize=5, **style)


def _draw_kl(axes: Axes, groups: Mapping[str, Sequence[_Run]]) -> None:
    """Draw KLs on a logarithmic scale, and a mark at its edge for what lies beyond it."""
    runs = [run for group in groups.values() for run in group]
    sizes = np.concatenate([x for run in runs for x in (run.kl, run.delta)])
    sizes = sizes[(sizes > 0) & (sizes < math.inf)]
    high = 2 * max(sizes, default=1e-2)
    low = min(high / 40, max(min(sizes, default=1e-2) / 2, high / 1e6))
    axes.set(yscale="log", ylim=(low, high))
    marks = {"v": "KL below the axis, such as 0", "^": "KL above the axis"}
    for group, style in zip(groups.values(), cycle(_STYLES), strict=False):
        for steps, _, kl, _ in group:
            axes.plot(steps, kl, style["marker"], color=style["color"], markersize=3, alpha=0.7)
            for mark, beyond, y in (("v", kl < low, 0.04), ("^", kl > high, 0.96)):
                if beyond.any():
                    x, heights = steps[beyond], np.full(beyond.sum(), y)  # as shares of the axis
                    line = axes.plot(x, heights, mark, color=style["color"], fillstyle="none")[0]
                    line.set(transform=axes.get_xaxis_transform(), label=marks.pop(mark, ""))
    bounded = [run for run in runs if np.isfinite(run.delta).any()]
    constant = {run.delta[0] for run in bounded if np.ptp(run.delta) == 0}
    lines = [axes.axhline(delta, **_BOUND) for delta in sorted(constant)]
    for run in bounded:
        if np.ptp(run.delta) != 0:
            lines += axes.plot(run.steps, run.delta, **_BOUND)
    if lines:
        lines[0].set_label("delta")
