"""Train a digit classifier within a KL radius, by Newton's method, and with their peers.

The data are the 1797 bundled 8x8 digits of scikit-learn, 1344 of them for training; the network is
a small tanh MLP. All runs of a seed share the split and the first weights. ``race.py`` describes
the comparison: at equal time, each peer with the best of several learning rates.

Run ``python docs/examples/classifier.py``; it takes about two minutes.
"""

from functools import cache
from pathlib import Path

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
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy

from trustregion import NaturalTrustRegion, NewtonTrustRegion

DELTA = 0.3
LRS = (0.003, 0.01, 0.03, 0.1)
COLUMNS = {"training loss": ".1e", "test loss": ".3f", "test accuracy": ".1%"}
PLOT = Path(__file__).with_suffix(".png")


def natural(task: Task, _: float) -> Updates:
    """Take steps to the edge of a KL ball, each shortened until the loss falls."""
    # As predictions grow confident, their Fisher matrix shrinks: a larger damping would hide it.
    optimizer = NaturalTrustRegion(task.model.parameters(), DELTA, damping=1e-4, cg_max_iter=20)
    while True:
        optimizer.step(task.loss)
        yield optimizer.info


def newton(task: Task, _: float) -> Updates:
    """Take the steps of the Gauss-Newton model within a Euclidean radius."""
    optimizer = NewtonTrustRegion(task.model.parameters(), curvature="ggn")
    while True:
        optimizer.step(task.loss)
        yield optimizer.info


def batched_adam(task: Task, lr: float) -> Updates:
    """Take steps of Adam on batches."""
    return descend(torch.optim.Adam(task.model.parameters(), lr), task, 64)


METHODS = {  # in colors that color-blind readers can tell apart
    "NaturalTrustRegion": Method(natural, "#0072B2"),
    "NewtonTrustRegion": Method(newton, "#CC79A7"),
    "L-BFGS, 20 per step": Method(lbfgs, "#000000"),
    "Adam, full batch": Method(adam, "#D55E00", LRS),
    "Adam, batches of 64": Method(batched_adam, "#009E73", LRS),
}


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Return images, with brightness from 0 to 1, and labels."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


def make_task() -> Task:
    """Split the digits, and make a network for them."""
    images, labels = digits()
    train, test = torch.randperm(len(labels)).split(1344)
    x, y = images[train], labels[train]
    layers = nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
    model = nn.Sequential(*layers)

    def loss(batch: Tensor | slice = ALL) -> tuple[Tensor, Categorical]:
        prediction = Categorical(logits=model(x[batch]))
        return -prediction.log_prob(y[batch]).mean(), prediction

    def measure() -> tuple[float, ...]:
        logits = model(images[test])
        right = logits.argmax(-1) == labels[test]
        test_loss = cross_entropy(logits, labels[test])
        return cross_entropy(model(x), y).item(), test_loss.item(), right.float().mean().item()

    return Task(model, len(y), loss, measure)


def draw(runs: Runs, path: Path) -> None:
    """Draw training loss and test accuracy against steps and seconds."""
    from matplotlib.figure import Figure  # imported late: training does not need it

    figure = Figure(figsize=(12, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for row, y in enumerate((2, 4)):
        for x in (0, 1):
            curves(axes[row, x], runs, METHODS, x, y)
    last = runs["NaturalTrustRegion"][0].rows[-1]
    axes[0, 0].set(yscale="log", ylabel="training loss (nats)", xlim=(0, last[0]))
    axes[1, 0].set(ylabel="test accuracy", xlabel="steps", ylim=(0.8, 1.0))
    axes[1, 1].set(xscale="log", xlabel="seconds", xlim=(0.005, last[1]))
    axes[0, 1].legend(frameon=False, fontsize="small")
    save(figure, path)


def main(*, steps: int = 40, seeds: int = 5, plot: Path = PLOT, quiet: bool = False) -> Runs:
    """Train, print a table, save the plot; return the runs of each method, one per seed."""
    runs = race(METHODS, make_task, steps, seeds, quiet)
    print(table(runs, steps, COLUMNS))
    draw(runs, plot)
    return runs


if __name__ == "__main__":
    main(**vars(options(__doc__, PLOT, 40, 5)))
