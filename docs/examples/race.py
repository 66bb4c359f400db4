"""Compare optimizers on the same task, from the same first weights, for as many seconds each.

The first method of a race takes a given number of steps. The others then get as many seconds as it
took, and at least as many steps, with each of their learning rates. The rate with the lowest
training loss by then, in the median over seeds, is shown. Rates are constant. Seconds are processor
seconds of one thread, so that other work on the machine has little influence; evaluation is not
timed. The classifier, the regressor, the autoencoder and variational inference share this module.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from tqdm import tqdm

from trustregion import StepInfo

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALL = slice(None)


class Loss(Protocol):
    """A function that returns the training loss and the prediction it was computed from."""

    def __call__(self, batch: Tensor | slice = ALL) -> tuple[Tensor, Distribution]:
        """Return both, with a graph, for all samples or for a batch."""
        ...


class Task(NamedTuple):
    """A model and its data."""

    model: nn.Module
    size: int  # the number of training samples
    loss: Loss
    measure: Callable[[], tuple[float, ...]]  # returns a row of numbers, the training loss first


Updates = Iterator[StepInfo | None]  # one item per step


class Method(NamedTuple):
    """An optimizer, and the learning rates to try, or None if it needs none."""

    updates: Callable[[Task, float], Updates]
    colour: str
    lrs: tuple[float, ...] | None = None


class Run(NamedTuple):
    """A training run; a row is (step, seconds, training loss, ...)."""

    lr: float | None
    rows: list[tuple[float, ...]]
    infos: list[StepInfo]  # from the optimizers that report on their steps
    model: nn.Module

    def after(self, seconds: float) -> tuple[float, ...]:
        """Return the first row after the given number of seconds."""
        return next(row for row in self.rows if row[1] >= seconds)


Runs = dict[str, list[Run]]  # for each method, one run per seed


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Help with the description as it is written, and with the defaults."""


def descend(optimizer: torch.optim.Optimizer, task: Task, batch_size: int | None = None) -> Updates:
    """Take gradient steps on all samples, or on batches that are reshuffled every epoch."""
    while True:
        for batch in torch.randperm(task.size).split(batch_size) if batch_size else [ALL]:
            optimizer.zero_grad()
            task.loss(batch)[0].backward()
            optimizer.step()
            yield None


def adam(task: Task, lr: float) -> Updates:
    """Take steps of Adam on all samples."""
    return descend(torch.optim.Adam(task.model.parameters(), lr), task)


def lbfgs(task: Task, _: float) -> Updates:
    """Take steps of torch's L-BFGS, of 20 iterations each, until float32 shows no progress."""
    optimizer = torch.optim.LBFGS(
        task.model.parameters(),
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss()[0]
        loss.backward()
        return loss

    while True:
        optimizer.step(closure)  # pyright: ignore[reportArgumentType] # torch says float
        yield None


def train(
    make: Callable[[], Task], method: Method, lr: float, seed: int, steps: int, seconds: float
) -> Run:
    """Train until the steps and the seconds are both used up."""
    torch.manual_seed(seed)
    task = make()
    updates = method.updates(task, lr)
    run, step, clock = Run(lr if method.lrs else None, [], [], task.model), 0, 0.0
    while True:
        ended = step >= steps and clock >= seconds
        if ended or step <= steps or step % 10 == 0:
            with torch.no_grad():
                numbers = (v if math.isfinite(v) else math.inf for v in task.measure())
                run.rows.append((step, clock, *numbers))
        if ended:
            return run
        start = time.process_time()
        info = next(updates)
        clock += time.process_time() - start
        step += 1
        run.infos.extend([info] if info else [])


def race(
    methods: dict[str, Method], make: Callable[[], Task], steps: int, seeds: int, quiet: bool
) -> Runs:
    """Return the runs of each method with its best learning rate."""
    for method in methods.values():  # the first steps in a process cost torch a second
        train(make, method, (method.lrs or (0.0,))[0], 0, 1, 0.0)
    jobs = [(name, lr) for name, method in methods.items() for lr in method.lrs or (0.0,)]
    runs: dict[tuple[str, float], list[Run]] = {job: [] for job in jobs}
    for seed, (name, lr) in tqdm(list(product(range(seeds), jobs)), disable=quiet):
        own = runs[jobs[0]]
        seconds = own[seed].rows[-1][1] if len(own) > seed else 0.0
        runs[name, lr].append(train(make, methods[name], lr, seed, steps, seconds))
    clocks = [run.rows[-1][1] for run in runs[jobs[0]]]

    def final(name: str, lr: float) -> float:
        return median(r.after(s)[2] for r, s in zip(runs[name, lr], clocks, strict=True))

    return {
        name: runs[name, min(method.lrs or (0.0,), key=lambda lr: final(name, lr))]
        for name, method in methods.items()
    }


def table(runs: Runs, steps: int, columns: dict[str, str]) -> str:
    """Compare the methods after equal steps and after equal time, in medians over seeds."""
    clocks = [run.rows[-1][1] for run in next(iter(runs.values()))]
    lines = [" " * 26 + "lr  steps  seconds" + "".join(f"  {title}" for title in columns)]
    for title, at_steps in (("after as many steps", True), ("after as many seconds", False)):
        lines.append(title)
        for name, group in runs.items():
            rows = (
                run.rows[steps] if at_steps else run.after(seconds)
                for run, seconds in zip(group, clocks, strict=True)
            )
            step, seconds, *numbers = map(median, zip(*rows, strict=True))
            cells = (
                f"{number:{len(title) + 2}{form}}"
                for number, (title, form) in zip(numbers, columns.items(), strict=True)
            )
            lr = group[0].lr or "-"
            lines.append(f"  {name:<20}{lr:>6}{step:7.0f}{seconds:9.2f}{''.join(cells)}")
    return "\n".join(lines)


def curves(ax: "Axes", runs: Runs, methods: dict[str, Method], x: int, y: int) -> None:
    """Draw column y against column x: the median over seeds, and a band from lowest to highest.

    Between two steps the curve stays at the value of the earlier one.
    """
    for i, (name, group) in enumerate(runs.items()):
        label = f"{name}, lr {group[0].lr}" if group[0].lr else name
        rows = list(zip(*(run.rows for run in group), strict=False))  # as long as the shortest
        at = [median(row[x] for row in seeds) for seeds in rows]
        values = [sorted(row[y] for row in seeds) for seeds in rows]
        low, middle, high = zip(*((v[0], median(v), v[-1]) for v in values), strict=True)
        style = {"color": methods[name].colour, "zorder": 2 - i / 10}  # the first on top
        ax.plot(at, middle, **style, linewidth=1.4, drawstyle="steps-post", label=label)
        ax.fill_between(at, low, high, **style, alpha=0.2, linewidth=0, step="post")


def save(figure: "Figure", path: Path) -> None:
    """Save the figure in 256 colors, its axes with a grid and without a box."""
    from PIL import Image  # imported late, like matplotlib, which needs it

    for ax in figure.axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    Image.open(path).convert("RGB").quantize().save(path, optimize=True)  # a third of the bytes


def options(description: str | None, plot: Path, steps: int, seeds: int) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=Help)
    parser.add_argument("--steps", type=int, default=steps, help="steps of the first method")
    parser.add_argument("--seeds", type=int, default=seeds, help="number of seeds")
    parser.add_argument("--plot", type=Path, default=plot, help="where to save the plot")
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    torch.set_num_threads(1)  # Such small matrices gain nothing from more; timings vary less.
    return parser.parse_args()
