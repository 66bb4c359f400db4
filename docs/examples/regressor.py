"""Fit a mean and an input-dependent noise scale within a KL radius, and with Adam beside it.

The data are 500 points of a curve whose noise grows from 0.02 to 0.27 along x; a small tanh MLP
predicts the mean and the scale of a Normal, and the loss is the negative log-likelihood (NLL). Its
gradient in the mean is small where the predicted scale is large; the natural gradient divides by
the Fisher matrix, which is small there too. All runs of a seed share the first weights and use the
full batch. NaturalTrustRegion takes ``--steps`` steps. Adam then gets as many seconds as those
took, with each learning rate of ``ADAM_LRS``: the one that ends with the lowest training NLL is
shown. Evaluation is not on the clock.

Run ``python docs/examples/regressor.py``; it takes about 15 s. ``--help`` shows the options.
"""

import argparse
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn.functional import softplus
from tqdm import tqdm

from trustregion import NaturalTrustRegion, StepInfo

DELTA = 0.3
ADAM_LRS = (0.001, 0.003, 0.01, 0.03)
METHODS = {"NaturalTrustRegion": ((None,), "#0072B2"), "Adam": (ADAM_LRS, "#D55E00")}
PLOT = Path(__file__).with_suffix(".png")

Data = tuple[Tensor, Tensor]  # inputs and targets


class Run(NamedTuple):
    """A training run; a row is (step, seconds, training NLL, test NLL)."""

    lr: float | None
    rows: list[tuple[float, ...]]
    infos: list[StepInfo]  # NaturalTrustRegion's account of its steps
    model: nn.Module


def truth(x: Tensor) -> Normal:
    """Return the distribution the data are drawn from."""
    return Normal(x * torch.sin(3 * x), 0.02 + 0.25 * torch.sigmoid(4 * x))


def predict(model: nn.Module, x: Tensor) -> Normal:
    """Return the model's distribution; the floor keeps the likelihood of a point bounded."""
    mean, raw = model(x).chunk(2, dim=-1)
    return Normal(mean, softplus(raw) + 1e-3)


def nll(prediction: Normal, y: Tensor) -> Tensor:
    """Average the negative log-likelihood over points, in nats."""
    return -prediction.log_prob(y).mean()


def natural(model: nn.Module, x: Tensor, y: Tensor) -> Iterator[StepInfo | None]:
    """Take steps to the edge of a KL ball, each shortened until the NLL falls."""
    optimizer = NaturalTrustRegion(
        model.parameters(), DELTA, damping=1e-3, cg_max_iter=20, backtrack_factor=0.5
    )

    def closure() -> tuple[Tensor, Normal]:
        prediction = predict(model, x)
        return nll(prediction, y), prediction

    while True:
        optimizer.step(closure)
        yield optimizer.info


def adam(model: nn.Module, x: Tensor, y: Tensor, lr: float) -> Iterator[None]:
    """Take Adam's steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    while True:
        optimizer.zero_grad()
        nll(predict(model, x), y).backward()
        optimizer.step()
        yield


def train(data: list[Data], seed: int, lr: float | None, steps: int, seconds: float) -> Run:
    """Train until the steps and the seconds are both used up."""
    torch.manual_seed(seed)
    layers = nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
    model = nn.Sequential(*layers)
    updates = adam(model, *data[0], lr) if lr else natural(model, *data[0])
    run, step, clock = Run(lr, [], [], model), 0, 0.0
    while True:
        if step <= steps or step % 10 == 0:
            with torch.no_grad():
                losses = [nll(predict(model, x), y).item() for x, y in data]
            run.rows.append((step, clock, *losses))
            if step >= steps and clock >= seconds:
                return run
        start = time.perf_counter()
        info = next(updates)
        clock += time.perf_counter() - start
        step += 1
        run.infos.extend([info] if info else [])


def table(runs: dict[str, list[Run]], steps: int, floor: list[float]) -> str:
    """Compare the methods after as many steps and after as many seconds, in means over seeds."""
    lines = [" " * 24 + "lr  steps  seconds  training NLL  test NLL"]
    for title, row in (("after as many steps", steps), ("after as many seconds", -1)):
        lines.append(title)
        for name, group in runs.items():
            means = map(fmean, zip(*(run.rows[row] for run in group), strict=True))
            numbers = "{:7.0f}{:9.2f}{:14.3f}{:10.3f}".format(*means)
            lines.append(f"  {name:<18}{group[0].lr or '-':>6}{numbers}")
    lines.append("{:<42}{:14.3f}{:10.3f}".format("the true distribution", *floor))
    return "\n".join(lines)


def draw(runs: dict[str, list[Run]], data: list[Data], floor: list[float], path: Path) -> None:
    """Draw the fits of the first seed, and the NLL of all against steps and seconds."""
    from matplotlib.figure import Figure  # late: training does not need it

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    axes = figure.subplot_mosaic([[name, "steps", "seconds"] for name in METHODS])
    grid = torch.linspace(-2, 2, 401).unsqueeze(-1)
    for name, group in runs.items():
        colour = METHODS[name][1]
        with torch.no_grad():
            fit = predict(group[0].model, grid)
        low, high = fit.mean - 2 * fit.stddev, fit.mean + 2 * fit.stddev
        axes[name].scatter(*data[0], s=2, color="0.6")
        axes[name].plot(grid, truth(grid).mean, color="black", linewidth=1, linestyle=":")
        axes[name].plot(grid, fit.mean, color=colour)
        axes[name].fill_between(grid[:, 0], low[:, 0], high[:, 0], color=colour, alpha=0.25)
        axes[name].set(ylim=(-2.4, 1.4))
        axes[name].set_title(f"{name}, {group[0].rows[-1][1]:.1f} s", fontsize="medium")
        for i, run in enumerate(group):
            *xs, train_nll, test_nll = zip(*run.rows, strict=True)
            for part, y, dash in (("training", train_nll, "--"), ("test", test_nll, "-")):
                style = {"color": colour, "linestyle": dash, "linewidth": 1.2}
                style["label"] = None if i else f"{name}, {part}"
                axes["steps"].plot(xs[0], y, **style)
                axes["seconds"].plot(xs[1], y, **style)
    last = runs["NaturalTrustRegion"][0].rows[-1]
    axes["steps"].set(xlabel="steps", ylabel="NLL (nats)", xlim=(0, last[0]))
    axes["seconds"].set(xlabel="seconds", xscale="log", xlim=(0.005, last[1]))
    for key in ("steps", "seconds"):
        axes[key].axhline(floor[1], color="black", linewidth=1, linestyle=":", label="truth, test")
        axes[key].set_ylim(-1.1, 1.3)
    axes["steps"].legend(frameon=False, loc="center right", fontsize="small")
    for ax in axes.values():
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main(
    *, steps: int = 40, seeds: int = 3, plot: Path = PLOT, quiet: bool = False
) -> dict[str, list[Run]]:
    """Train, print a table, save the plot; return the runs of each method, one a seed."""
    torch.manual_seed(0)
    inputs = 4 * torch.rand(500, 1) - 2, 4 * torch.rand(2000, 1) - 2
    data = [(x, truth(x).sample()) for x in inputs]
    floor = [nll(truth(x), y).item() for x, y in data]
    train(data, 0, None, 1, 0.0)  # a process's first optimizer costs torch a second
    runs: dict[tuple[str, float | None], list[Run]] = {}
    jobs = [(name, lr) for name, (lrs, _) in METHODS.items() for lr in lrs]
    for seed, (name, lr) in tqdm(list(product(range(seeds), jobs)), disable=quiet):
        seconds = runs["NaturalTrustRegion", None][seed].rows[-1][1] if lr else 0.0
        runs.setdefault((name, lr), []).append(train(data, seed, lr, steps, seconds))
    best = {
        name: min((runs[name, lr] for lr in lrs), key=lambda g: fmean(r.rows[-1][2] for r in g))
        for name, (lrs, _) in METHODS.items()
    }
    print(table(best, steps, floor))
    draw(best, data, floor, plot)
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
