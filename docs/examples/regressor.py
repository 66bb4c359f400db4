"""Fit a mean and an input-dependent noise scale within a KL radius, and with other optimizers.

The data are 500 points of a curve whose noise grows from 0.02 to 0.27 along x. A small tanh MLP
predicts the mean and the scale of a Normal, and the loss is the negative log-likelihood (NLL). Its
gradient with respect to the mean is small where the predicted scale is large; the natural gradient
divides by the Fisher matrix, which is small there too. All runs of a seed share the first weights.
``race.py`` describes the comparison: at equal time, Adam with the best of several learning rates.

Run ``python docs/examples/regressor.py``; it takes about a minute.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from race import ALL, Method, Runs, Task, Updates, adam, curves, lbfgs, options, race, save, table
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn.functional import softplus

from trustregion import NaturalTrustRegion, NewtonTrustRegion

DELTA = 0.3
COLUMNS = {"training NLL": ".3f", "test NLL": ".3f"}
PLOT = Path(__file__).with_suffix(".png")

Data = tuple[Tensor, Tensor]  # inputs and targets


def natural(task: Task, _: float) -> Updates:
    """Take steps to the edge of a KL ball, each shortened until the NLL falls."""
    optimizer = NaturalTrustRegion(task.model.parameters(), DELTA, damping=1e-4, cg_max_iter=20)
    while True:
        optimizer.step(task.loss)
        yield optimizer.info


def newton(task: Task, _: float) -> Updates:
    """Take steps of the quadratic model with the Fisher matrix, within a Euclidean radius."""
    # With the default, which solves coarsely far from a minimum, it takes 2 to 3 times the steps.
    optimizer = NewtonTrustRegion(task.model.parameters(), curvature="ggn", rtol=1e-2, max_iter=20)
    while True:
        optimizer.step(task.loss)
        yield optimizer.info


METHODS = {  # in colors that color-blind readers can tell apart
    "NaturalTrustRegion": Method(natural, "#0072B2"),
    "NewtonTrustRegion": Method(newton, "#CC79A7"),
    "L-BFGS, 20 per step": Method(lbfgs, "#000000"),
    "Adam": Method(adam, "#D55E00", (0.001, 0.003, 0.01, 0.03)),
}
LAYOUT: list[Any] = [  # The plot has fits in the upper row and curves in the lower one.
    [name for name in METHODS for _ in range(3)],
    [key for key in ("steps", "seconds", "test") for _ in range(4)],
]


def truth(x: Tensor) -> Normal:
    """Return the distribution from which the data are drawn."""
    return Normal(x * torch.sin(3 * x), 0.02 + 0.25 * torch.sigmoid(4 * x))


def predict(model: nn.Module, x: Tensor) -> Normal:
    """Return the model's distribution, with a least scale that bounds the likelihood."""
    mean, raw = model(x).chunk(2, dim=-1)
    return Normal(mean, softplus(raw) + 1e-3)


def nll(prediction: Normal, y: Tensor) -> Tensor:
    """Return the mean negative log-likelihood over points, in nats."""
    return -prediction.log_prob(y).mean()


@cache
def points() -> tuple[Data, Data]:
    """Draw the training and the test data, which are always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inputs = 4 * torch.rand(500, 1) - 2, 4 * torch.rand(2000, 1) - 2
        train, test = ((x, truth(x).sample()) for x in inputs)
    return train, test


def make_task() -> Task:
    """Make a network for the training data."""
    data = points()
    x, y = data[0]
    layers = nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
    model = nn.Sequential(*layers)

    def loss(batch: Tensor | slice = ALL) -> tuple[Tensor, Normal]:
        prediction = predict(model, x[batch])
        return nll(prediction, y[batch]), prediction

    def measure() -> tuple[float, ...]:
        return tuple(nll(predict(model, x), y).item() for x, y in data)

    return Task(model, len(y), loss, measure)


def draw(runs: Runs, floor: list[float], path: Path) -> None:
    """Draw the fits of the first seed, and the NLL of all seeds against steps and seconds."""
    from matplotlib.figure import Figure  # imported late: training does not need it

    figure = Figure(figsize=(11, 5.8), layout="constrained")
    axes = figure.subplot_mosaic(LAYOUT)
    grid = torch.linspace(-2, 2, 401).unsqueeze(-1)
    for name, group in runs.items():
        ax = axes[name]
        colour = METHODS[name].colour
        with torch.no_grad():
            fit = predict(group[0].model, grid)
        low, high = fit.mean - 2 * fit.stddev, fit.mean + 2 * fit.stddev
        ax.scatter(*points()[0], s=2, color="0.6")
        ax.plot(grid, truth(grid).mean, color="black", linewidth=1, linestyle=":")
        ax.plot(grid, fit.mean, color=colour)
        ax.fill_between(grid[:, 0], low[:, 0], high[:, 0], color=colour, alpha=0.25)
        ax.set(ylim=(-2.4, 1.4))
        ax.set_title(f"{name}, {group[0].rows[-1][1]:.1f} s", fontsize="medium")
    last = runs["NaturalTrustRegion"][0].rows[-1]
    for key, x, y in (("steps", 0, 2), ("seconds", 1, 2), ("test", 1, 3)):
        curves(axes[key], runs, METHODS, x, y)
        axes[key].axhline(floor[y - 2], color="black", linewidth=1, linestyle=":", label="truth")
        part, unit = ("training", "test")[y - 2], ("steps", "seconds")[x]
        axes[key].set(ylabel=f"{part} NLL (nats)", ylim=(-1.15, 0.8), xlabel=unit)
        if x:
            axes[key].set(xscale="log", xlim=(0.01, last[1]))
            axes[key].xaxis.set_minor_formatter("")
    axes["steps"].set(xlim=(0, last[0]))
    lines = axes["steps"].get_legend_handles_labels()
    figure.legend(*lines, frameon=False, fontsize="small", loc="outside lower center", ncols=5)
    save(figure, path)


def main(*, steps: int = 40, seeds: int = 5, plot: Path = PLOT, quiet: bool = False) -> Runs:
    """Train, print a table, save the plot; return the runs of each method, one per seed."""
    floor = [nll(truth(x), y).item() for x, y in points()]
    runs = race(METHODS, make_task, steps, seeds, quiet)
    print(table(runs, steps, COLUMNS))
    print("{:<43}{:14.3f}{:10.3f}".format("the true distribution", *floor))
    draw(runs, floor, plot)
    return runs


if __name__ == "__main__":
    main(**vars(options(__doc__, PLOT, 40, 5)))
