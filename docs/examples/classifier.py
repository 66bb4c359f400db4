"""Train a digit classifier within a KL radius, and with Adam beside it.

The data are the 1797 bundled 8x8 digits of scikit-learn, 1344 of them for training; the network is
a small tanh MLP. All runs of a seed share the split and the first weights. NaturalTrustRegion takes
``--steps`` steps on the full batch. Adam then gets as many seconds as those took, with each
learning rate of ``ADAM_LRS``: the one that ends with the lowest training loss is shown. Evaluation
is not on the clock.

Run ``python docs/examples/classifier.py``; it takes about a minute. ``--help`` shows the options.
"""

import argparse
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from trustregion import NaturalTrustRegion, StepInfo

DELTA = 0.3
ADAM_LRS = (0.003, 0.01, 0.03, 0.1)
METHODS = {  # learning rates, batch size, and a colour that the colour-blind tell from the others
    "NaturalTrustRegion": ((None,), 1344, "#0072B2"),
    "Adam, full batch": (ADAM_LRS, 1344, "#D55E00"),
    "Adam, batches of 64": (ADAM_LRS, 64, "#009E73"),
}
PLOT = Path(__file__).with_suffix(".png")

Digits = tuple[Tensor, Tensor]  # images and labels


class Run(NamedTuple):
    """A training run; a row is (step, seconds, training loss, test loss, test accuracy)."""

    lr: float | None
    rows: list[tuple[float, ...]]
    infos: list[StepInfo]  # NaturalTrustRegion's account of its steps


def natural(model: nn.Module, x: Tensor, y: Tensor) -> Iterator[StepInfo | None]:
    """Take steps to the edge of a KL ball, each shortened until the loss falls."""
    # As predictions grow confident their Fisher matrix shrinks: a larger damping would drown it.
    # The ball's edge moves away, in the end to 2000 times the best step: halving gets back soonest.
    optimizer = NaturalTrustRegion(
        model.parameters(), DELTA, damping=1e-4, cg_max_iter=20, backtrack_factor=0.5
    )

    def closure() -> tuple[Tensor, Categorical]:
        prediction = Categorical(logits=model(x))
        return -prediction.log_prob(y).mean(), prediction

    while True:
        optimizer.step(closure)
        yield optimizer.info


def adam(model: nn.Module, x: Tensor, y: Tensor, lr: float, size: int) -> Iterator[None]:
    """Take Adam's steps, on batches that are reshuffled every epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    while True:
        for batch in torch.randperm(len(y)).split(size):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            yield


def train(
    digits: Digits, seed: int, lr: float | None, size: int, steps: int, seconds: float
) -> Run:
    """Train until the steps and the seconds are both used up."""
    torch.manual_seed(seed)
    parts = torch.randperm(len(digits[1])).split(1344)
    (x, x_test), (y, y_test) = ([whole[part] for part in parts] for whole in digits)
    layers = nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
    model = nn.Sequential(*layers)
    updates = adam(model, x, y, lr, size) if lr else natural(model, x, y)
    run, step, clock = Run(lr, [], []), 0, 0.0
    while True:
        if step <= steps or step % 10 == 0:
            with torch.no_grad():
                logits, logits_test = model(x), model(x_test)
                losses = cross_entropy(logits, y).item(), cross_entropy(logits_test, y_test).item()
                accuracy = (logits_test.argmax(-1) == y_test).float().mean().item()
            run.rows.append((step, clock, *losses, accuracy))
            if step >= steps and clock >= seconds:
                return run
        start = time.perf_counter()
        info = next(updates)
        clock += time.perf_counter() - start
        step += 1
        run.infos.extend([info] if info else [])


def table(runs: dict[str, list[Run]], steps: int) -> str:
    """Compare the methods after as many steps and after as many seconds, in means over seeds."""
    lines = [" " * 25 + "lr  steps  seconds  training loss  test loss  test accuracy"]
    for title, row in (("after as many steps", steps), ("after as many seconds", -1)):
        lines.append(title)
        for name, group in runs.items():
            columns = list(zip(*(run.rows[row] for run in group), strict=True))
            step, seconds, _, test_loss, accuracy = map(fmean, columns)
            lines.append(
                f"  {name:<20}{group[0].lr or '-':>5}{step:7.0f}{seconds:9.2f}"
                f"{geometric_mean(columns[2]):15.1e}{test_loss:11.3f}{accuracy:15.1%}"
            )
    return "\n".join(lines)


def draw(runs: dict[str, list[Run]], path: Path) -> None:
    """Draw training loss and test accuracy against steps and seconds, one line a seed."""
    from matplotlib.figure import Figure  # late: training does not need it

    figure = Figure(figsize=(12, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for name, group in runs.items():
        label = f"{name}, lr {group[0].lr}" if group[0].lr else f"{name}, delta {DELTA}"
        style = {"color": METHODS[name][2], "linewidth": 1.2, "alpha": 0.8}
        for i, run in enumerate(group):
            step, seconds, loss, _, accuracy = zip(*run.rows, strict=True)
            for column, x in enumerate((step, seconds)):
                axes[0, column].plot(x, loss, **style, label=None if i else label)
                axes[1, column].plot(x, accuracy, **style)
    last = runs["NaturalTrustRegion"][0].rows[-1]
    axes[0, 0].set(yscale="log", ylabel="training loss (nats)", xlim=(0, last[0]))
    axes[1, 0].set(ylabel="test accuracy", xlabel="steps", ylim=(0.8, 1.0))
    axes[1, 1].set(xscale="log", xlabel="seconds", xlim=(0.005, last[1]))
    axes[0, 1].legend(frameon=False)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main(
    *, steps: int = 40, seeds: int = 3, plot: Path = PLOT, quiet: bool = False
) -> dict[str, list[Run]]:
    """Train, print a table, save the plot; return the runs of each method, one a seed."""
    x, y = load_digits(return_X_y=True)
    digits = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    train(digits, 0, None, 1344, 1, 0.0)  # a process's first optimizer costs torch a second
    runs: dict[tuple[str, float | None], list[Run]] = {}
    jobs = [(name, lr, size) for name, (lrs, size, _) in METHODS.items() for lr in lrs]
    for seed, (name, lr, size) in tqdm(list(product(range(seeds), jobs)), disable=quiet):
        seconds = runs["NaturalTrustRegion", None][seed].rows[-1][1] if lr else 0.0
        run = train(digits, seed, lr, size, steps, seconds)
        runs.setdefault((name, lr), []).append(run)

    best = {
        name: min(
            (runs[name, lr] for lr in lrs),
            key=lambda group: geometric_mean(run.rows[-1][2] for run in group),
        )
        for name, (lrs, _, _) in METHODS.items()
    }
    print(table(best, steps))
    draw(best, plot)
    return best


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40, help="steps of NaturalTrustRegion")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--plot", type=Path, default=PLOT, help="where to save the plot")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    torch.set_num_threads(1)  # matrices this small gain nothing from more, and timings vary less
    main(**vars(parser.parse_args()))
