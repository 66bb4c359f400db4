"""Train a deep autoencoder by Hessian-free optimization, and with other optimizers.

The setting is that of Martens, Deep Learning via Hessian-free Optimization, 2010, scaled down. The
1797 bundled 8x8 digits of scikit-learn go through 64-50-25-12-6-12-25-50-64 units, which are tanh
except for the code and the output, and come back as the probabilities of bright pixels. The loss is
their cross-entropy, and the error is the squared distance per image. Both are measured on the
training data, because the question is optimization, as it was in that paper. A network first learns
to answer with the mean image, at an error of 4.69, and gradient steps may stay there for a while.
``race.py`` describes the comparison: at equal time, the peers with the best of several learning
rates.

Run ``python docs/examples/autoencoder.py``; it takes about six minutes.
"""

import math
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from race import (
    ALL,
    Method,
    Runs,
    Task,
    Updates,
    curves,
    descend,
    lbfgs,
    options,
    race,
    save,
    table,
)
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import Bernoulli

from trustregion import KFAC, NaturalTrustRegion, NewtonTrustRegion
from trustregion.optim import Region

SIZES = (64, 50, 25, 12, 6, 12, 25, 50, 64)
BATCH = 128
COLUMNS = {"cross-entropy": ".2f", "squared error": ".3f"}
PLOT = Path(__file__).with_suffix(".png")


def hessian_free(task: Task, _: float, *, plain: bool = False) -> Updates:
    """Solve damped Gauss-Newton systems from the last solution, until Martens' rule stops them.

    Martens preconditions with a diagonal matrix; here the preconditioner is KFAC, or none.
    """
    optimizer = NewtonTrustRegion(
        task.model.parameters(),
        math.inf,
        curvature="ggn",
        damping=0.1,
        rtol=0.0,  # so that solves end by Martens' rule alone
        max_iter=250,
        preconditioner=None if plain else KFAC(task.model),
        region=Region(solver="cg", damping_factor=1.5, warm_start=0.95),
    )
    while True:
        optimizer.step(task.loss)
        yield optimizer.info


def natural(task: Task, _: float) -> Updates:
    """Take steps to the edge of a KL ball, where the KL is the joint one of all pixels."""
    optimizer = NaturalTrustRegion(
        task.model.parameters(), delta=1.0, cg_max_iter=50, preconditioner=KFAC(task.model)
    )
    while True:
        optimizer.step(task.loss)
        yield optimizer.info


def adam(task: Task, lr: float) -> Updates:
    """Take steps of Adam on batches."""
    return descend(torch.optim.Adam(task.model.parameters(), lr), task, BATCH)


def momentum(task: Task, lr: float) -> Updates:
    """Take steps of SGD with Nesterov momentum on batches."""
    optimizer = torch.optim.SGD(task.model.parameters(), lr, momentum=0.9, nesterov=True)
    return descend(optimizer, task, BATCH)


METHODS = {  # in colors that color-blind readers can tell apart
    "Hessian-free": Method(hessian_free, "#CC79A7"),
    "Hessian-free, plain": Method(partial(hessian_free, plain=True), "#E69F00"),
    "NaturalTrustRegion": Method(natural, "#0072B2"),
    "L-BFGS, 20 per step": Method(lbfgs, "#000000"),
    "Adam": Method(adam, "#D55E00", (0.001, 0.003, 0.01, 0.03)),
    "momentum SGD": Method(momentum, "#009E73", (0.001, 0.003, 0.01, 0.03)),
}


def make_task() -> Task:
    """Make a network for the images."""
    x = torch.tensor(load_digits(return_X_y=True)[0] / 16, dtype=torch.float32)
    layers: list[nn.Module] = []
    for size, following in pairwise(SIZES):
        layers += [nn.Linear(size, following), nn.Tanh()]
    del layers[7], layers[-1]  # the code and the output are linear
    model = nn.Sequential(*layers)

    def loss(batch: Tensor | slice = ALL) -> tuple[Tensor, Bernoulli]:
        images = x[batch]
        # A brightness between 0 and 1 is not a sample of a Bernoulli, but it has a cross-entropy.
        prediction = Bernoulli(logits=model(images), validate_args=False)
        return -prediction.log_prob(images).sum(1).mean(), prediction

    def measure() -> tuple[float, ...]:
        entropy, prediction = loss()
        return entropy.item(), (prediction.probs - x).square().sum(1).mean().item()

    return Task(model, len(x), loss, measure)


def draw(runs: Runs, path: Path) -> None:
    """Draw the squared error against steps and seconds."""
    from matplotlib.figure import Figure  # imported late: training does not need it

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for x, ax in enumerate(axes):
        curves(ax, runs, METHODS, x, 3)
    last = runs["Hessian-free"][0].rows[-1]
    axes[0].set(xlabel="steps", xlim=(0, last[0]), yscale="log", ylim=(0.4, 20))
    axes[0].set(ylabel="squared error per image, training data")
    axes[1].set(xlabel="seconds", xlim=(0, last[1]))
    axes[1].legend(frameon=False)
    save(figure, path)


def main(*, steps: int = 40, seeds: int = 3, plot: Path = PLOT, quiet: bool = False) -> Runs:
    """Train, print a table, save the plot; return the runs of each method, one per seed."""
    runs = race(METHODS, make_task, steps, seeds, quiet)
    print(table(runs, steps, COLUMNS))
    draw(runs, plot)
    return runs


if __name__ == "__main__":
    main(**vars(options(__doc__, PLOT, 40, 3)))
