"""Variational inference within a KL radius, where the prediction is the posterior itself.

A Bayesian logistic regression on the breast-cancer data that come with scikit-learn: 31
coefficients with a prior of N(0, 1) each, and a Normal of full covariance, 527 numbers, as their
approximate posterior q. The objective to maximize is the evidence lower bound (ELBO),
``E_q[log p(y | w)] - KL(q || prior)``. The expectation is the mean over draws of q that come from
one fixed set of noise (a sample-average approximation), so that the loss is a deterministic
function. A step of ``NaturalTrustRegion`` is bounded in KL(old q || new q), which says how far the
belief moves, independently of its parametrization. All runs of a seed share the noise and the split
of the data, and begin at the prior. ``race.py`` describes the comparison: at equal time, Adam with
the best of several learning rates, on all draws and on batches of them.

Run ``python docs/examples/variational.py``; it takes about two minutes.
"""

import math
from functools import cache
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from race import (
    ALL,
    Method,
    Runs,
    Task,
    Updates,
    adam,
    curves,
    descend,
    lbfgs,
    options,
    race,
    save,
    table,
)
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from trustregion import NaturalTrustRegion

DELTA = 3.0
DRAWS, BATCH, OTHERS = 1024, 16, 2048  # for the loss, for a step of Adam, and to measure with
TRAINING = 400
COLUMNS = {"-ELBO": ".2f", "its own draws": ".2f", "test log predictive": ".4f"}
PLOT = Path(__file__).with_suffix(".png")


def natural(task: Task, _: float) -> Updates:
    """Take steps to the edge of a KL ball, each shortened until the loss falls."""
    optimizer = NaturalTrustRegion(task.model.parameters(), DELTA)
    while True:
        optimizer.step(task.loss)
        yield optimizer.info


def sampled_adam(task: Task, lr: float) -> Updates:
    """Take steps of Adam on a few of the draws."""
    return descend(torch.optim.Adam(task.model.parameters(), lr), task, BATCH)


LRS = (0.01, 0.03, 0.1, 0.3)
METHODS = {  # in colors that color-blind readers can tell apart
    "NaturalTrustRegion": Method(natural, "#0072B2"),
    "L-BFGS, 20 per step": Method(lbfgs, "#000000"),
    "Adam, all draws": Method(adam, "#D55E00", LRS),
    "Adam, 16 draws": Method(sampled_adam, "#E69F00", LRS),
}


class Data(NamedTuple):
    """Inputs, whose first column is 1, and labels."""

    x: Tensor
    y: Tensor


class Posterior(nn.Module):
    """A Normal of full covariance, initially N(0, 1)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        below = size * (size - 1) // 2
        self.below = nn.Parameter(torch.zeros(below, dtype=torch.float64))
        one = math.log(math.e - 1)  # softplus(one) = 1
        self.raw = nn.Parameter(torch.full((size,), one, dtype=torch.float64))

    def forward(self) -> MultivariateNormal:
        """Return q."""
        rows, columns = torch.tril_indices(len(self.raw), len(self.raw), -1)
        scale = softplus(self.raw).diag().index_put((rows, columns), self.below)
        return MultivariateNormal(self.mean, scale_tril=scale)


@cache
def samples() -> Data:
    """Return all samples, in the order of the file."""
    x, y = load_breast_cancer(return_X_y=True)
    return Data(torch.tensor(x), torch.tensor(y, dtype=torch.float64))


def split() -> tuple[Data, Data]:
    """Draw the training samples; standardize all by the training means and deviations."""
    x, y = samples()
    train, test = torch.randperm(len(y)).split([TRAINING, len(y) - TRAINING])
    scaled = (x - x[train].mean(0)) / x[train].std(0)
    x = torch.cat([torch.ones_like(x[:, :1]), scaled], dim=1)
    return Data(x[train], y[train]), Data(x[test], y[test])


def log_likelihoods(q: MultivariateNormal, noise: Tensor, data: Data) -> Tensor:
    """Return log p(y | w) for each draw w of q and each sample, shape (draws, samples)."""
    logits = (q.loc + noise @ q.scale_tril.mT) @ data.x.mT
    return -binary_cross_entropy_with_logits(logits, data.y.expand_as(logits), reduction="none")


def elbo(q: MultivariateNormal, noise: Tensor, data: Data) -> Tensor:
    """Return the evidence lower bound, in nats for all samples together."""
    prior = MultivariateNormal(torch.zeros_like(q.loc), torch.eye(len(q.loc)).to(q.loc))
    return log_likelihoods(q, noise, data).sum(1).mean() - kl_divergence(q, prior)


def log_predictive(q: MultivariateNormal, noise: Tensor, data: Data) -> Tensor:
    """Return the mean over samples of the log of the label's mean probability over draws."""
    each = log_likelihoods(q, noise, data)
    return (each.logsumexp(0) - math.log(len(noise))).mean()


def make_task() -> Task:
    """Make a split, the noise, and the prior as the first approximation."""
    train, test = split()
    size = train.x.shape[1]
    half, others = (torch.randn(n, size, dtype=torch.float64) for n in (DRAWS // 2, OTHERS))
    noise = torch.cat([half, -half])  # in pairs, so that the mean of the draws is the mean of q
    model = Posterior(size)

    def loss(batch: Tensor | slice = ALL) -> tuple[Tensor, MultivariateNormal]:
        q = model()
        return -elbo(q, noise[batch], train), q

    def measure() -> tuple[float, ...]:
        q = model()
        numbers = -elbo(q, others, train), -elbo(q, noise, train), log_predictive(q, others, test)
        return tuple(number.item() for number in numbers)

    return Task(model, DRAWS, loss, measure)


def with_gaps(runs: Runs) -> Runs:
    """Append to each row the loss minus the lowest loss that any run of the seed found."""
    lowest = [min(run.rows[-1][3] for run in seed) for seed in zip(*runs.values(), strict=True)]
    return {
        name: [
            run._replace(rows=[(*row, row[3] - low) for row in run.rows])
            for run, low in zip(group, lowest, strict=True)
        ]
        for name, group in runs.items()
    }


def arrivals(runs: Runs) -> str:
    """Return a table of when each method comes near the lowest loss, in medians over seeds."""
    lines = ["seconds until within       1 nat  0.1 nats  0.01 nats"]
    for name, group in runs.items():
        times = (
            median(next((row[1] for row in run.rows if row[-1] <= gap), math.inf) for run in group)
            for gap in (1.0, 0.1, 0.01)
        )
        cells = (f"{time:10.2f}" if time < math.inf else f"{'-':>10}" for time in times)
        lines.append(f"  {name:<20}" + "".join(cells))
    return "\n".join(lines)


def draw(runs: Runs, path: Path) -> None:
    """Draw the loss against steps and seconds, and the test log predictive against seconds."""
    from matplotlib.figure import Figure  # imported late: training does not need it

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    last = runs["NaturalTrustRegion"][0].rows[-1]
    for ax, x, y in zip(axes, (0, 1, 1), (5, 5, 4), strict=True):
        curves(ax, runs, METHODS, x, y)
        ax.set(xlabel=("steps", "seconds")[x], xlim=(0, last[0]))
        if x:
            ax.set(xscale="log", xlim=(0.02, last[1]))
            ax.xaxis.set_minor_formatter("")
        if y == 5:
            ax.set(ylabel="-ELBO above the lowest (nats)", yscale="log", ylim=(1e-3, 1e3))
        else:
            ax.set(ylabel="test log predictive (nats)", ylim=(-0.2, -0.04))
    lines = axes[0].get_legend_handles_labels()
    figure.legend(*lines, frameon=False, fontsize="small", loc="outside lower center", ncols=4)
    save(figure, path)


def main(*, steps: int = 20, seeds: int = 5, plot: Path = PLOT, quiet: bool = False) -> Runs:
    """Fit, print a table, save the plot; return the runs of each method, one per seed.

    The last number of a row is the difference to the lowest loss.
    """
    runs = race(METHODS, make_task, steps, seeds, quiet)
    print(table(runs, steps, COLUMNS))
    runs = with_gaps(runs)
    print(arrivals(runs))
    draw(runs, plot)
    return runs


if __name__ == "__main__":
    main(**vars(options(__doc__, PLOT, 20, 5)))
