"""The time of a product against the number of samples and of parameters: a plot, and a table.

Tanh networks of two layers under a normal distribution, one thread. All points of a panel take
turns, and each is its median. The clock is the processor's time, which does not run while another
program has the core. The slope, fitted to the logarithms over the upper half of the points, is 1
where the cost is linear.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from pathlib import Path
from statistics import linear_regression, median

import torch
from matplotlib.figure import Figure

from benchmarks.allocator import keep_freed_memory
from benchmarks.curvature_models import Model, make, policy
from benchmarks.curvature_peers import Maker, Product, kl_graph_kept, ours
from benchmarks.report import row

PLOT = Path(__file__).parent.parent / "docs" / "curvature_cost.png"
SAMPLES = [2**k for k in range(7, 17)]
WIDTHS = [16, 32, 64, 128, 256, 512, 1024]
HIDDEN, STATES = 64, 512
"""What is held fixed in each panel."""
BUDGET = 0.02
"""Seconds of products in a row."""
WAYS: dict[str, tuple[Maker, str, str]] = {
    "ours": (partial(ours, backend="auto"), "#0072B2", "o"),
    "ours, backend graph": (partial(ours, backend="graph"), "#56B4E9", "s"),
    "kl graph kept": (kl_graph_kept, "#D55E00", "^"),
}
Points = dict[str, list[tuple[int, float]]]
"""(size, milliseconds) of each way."""


def seconds(model: Model, product: Product, calls: int) -> float:
    """Return the processor's time for the calls, after one that does not count."""
    v = model.vector()
    product.run(v)
    start = time.process_time()
    for _ in range(calls):
        product.run(v)
    return time.process_time() - start


def sweep(models: dict[int, Model], turns: int) -> Points:
    """Return the points of one panel, all of which take turns."""
    cases = {
        (name, size): (model, maker(model))
        for size, model in models.items()
        for name, (maker, *_) in WAYS.items()
    }
    calls = {key: max(1, min(10, int(BUDGET / seconds(*case, 1)))) for key, case in cases.items()}
    found: dict[tuple[str, int], list[float]] = {key: [] for key in cases}
    for _ in range(turns):
        for key, case in cases.items():
            found[key].append(1e3 * seconds(*case, calls[key]) / calls[key])
    return {name: [(size, median(found[name, size])) for size in models] for name in WAYS}


def slope(points: list[tuple[int, float]]) -> float:
    """Return the exponent of the growth over the upper half of the points."""
    upper = [(math.log(x), math.log(y)) for x, y in points[len(points) // 2 :]]
    return linear_regression(*zip(*upper, strict=True)).slope


def draw(panels: dict[str, Points], path: Path) -> None:
    """Draw a panel for each sweep, with a line of slope 1 through our last point."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (label, panel) in zip(axes, panels.items(), strict=True):
        for name, points in panel.items():
            _, colour, marker = WAYS[name]
            x, y = zip(*points, strict=True)
            ax.plot(x, y, color=colour, marker=marker, markersize=5, label=name)
        x, y = zip(*panel["ours"], strict=True)
        line = [y[-1] * size / x[-1] for size in x]
        ax.plot(x, line, color="0.5", linestyle="--", linewidth=1, label="slope 1")
        ax.set(xscale="log", yscale="log", xlabel=label)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="ms a product, 1 thread")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Draw the plot and print the table."""
    parser = argparse.ArgumentParser(description="Time of a product against its sizes.")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--plot", type=Path, default=PLOT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    by_samples = {states: make(partial(policy, states, HIDDEN)) for states in SAMPLES}
    by_width = [make(partial(policy, STATES, width)) for width in WIDTHS]
    n = by_samples[SAMPLES[0]].vector().numel()
    panels = {
        f"samples N (n = {n:,} parameters)": sweep(by_samples, args.turns),
        f"parameters n (N = {STATES} samples)": sweep(
            {model.vector().numel(): model for model in by_width}, args.turns
        ),
    }
    draw(panels, args.plot)
    print(row("against", "who", "smallest", "ms", "largest", "ms", "slope, upper half"))
    print(row("---", "---", *["---:"] * 5))
    for label, panel in panels.items():
        for name, points in panel.items():
            ends = [cell for x, y in (points[0], points[-1]) for cell in (f"{x:,}", f"{y:.2f}")]
            print(row(label, name, *ends, f"{slope(points):.2f}"))


if __name__ == "__main__":
    main()
