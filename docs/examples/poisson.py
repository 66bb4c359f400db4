"""Solve a Poisson equation with a neural network by energy natural gradients.

The setting is that of Mueller and Zeinhofer, Achieving High Accuracy with PINNs via Energy Natural
Gradient Descent, ICML 2023: -Laplacian(u) = f on the unit square, u = 0 on its boundary, with the
solution sin(pi x) sin(pi y); a 2-32-1 tanh network in float64, initialized as in the paper; 30 x 30
points inside and 30 per side; 51 iterations. The loss is the energy: half the mean square of the
residuals, which is the negative log-likelihood of a Normal of unit scale at the residuals. The
metric of the energy is the Fisher matrix of this Normal.

This matrix is singular to rounding, so a step works with its root R, R'R = F, whose singular values
span half as many orders of magnitude. The natural gradient is the least-squares solution of R x =
y, without the singular values that are noise. The best of the lengths 1, 1/2, ..., 2^-30 is taken,
as in the paper. In the first steps, where such long steps fail, the solution is damped instead, and
the best of several dampings is taken.

Adam, L-BFGS and Levenberg-Marquardt (``NewtonTrustRegion``) get ``--times`` as many seconds, which
are processor seconds of one thread.

Run ``python docs/examples/poisson.py``; it takes about half an hour, and about a minute with
``--seeds 1 --times 1``.
"""

import argparse
import math
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from race import Help, save
from torch import Tensor, nn
from torch.distributions import Normal
from torch.func import functional_call, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from trustregion import FisherOperator, NewtonTrustRegion
from trustregion.optim import Region

HIDDEN, POINTS = 32, 30
WARM_UP = 8  # damped steps at the start
DAMPINGS = (1e-3, 1e-4, 1e-5, 1e-6)  # for singular values, relative to the largest
CUTOFF = 1e-6  # Singular values below this, relative to the largest, are noise.
LENGTHS = 0.5 ** torch.arange(31, dtype=torch.float64)
LRS = (1e-3, 3e-3, 1e-2)
COLOURS = {  # that color-blind readers can tell apart
    "energy natural gradient": "#0072B2",
    "Levenberg-Marquardt": "#CC79A7",
    "L-BFGS": "#000000",
    "Adam": "#D55E00",
}
PLOT = Path(__file__).with_suffix(".png")

Updates = Iterator[None]


class Run(NamedTuple):
    """A training run; a row is (step, seconds, relative L2 error)."""

    lr: float | None
    rows: list[tuple[int, float, float]]

    @property
    def final(self) -> tuple[int, float, float]:
        """Return the last row."""
        return self.rows[-1]


Runs = dict[str, list[Run]]  # for each method, one run per seed


def solution(x: Tensor) -> Tensor:
    """Return the true u at points (n, 2)."""
    return torch.sin(math.pi * x).prod(dim=1)


def grid(inner: int) -> Tensor:
    """Return inner x inner points of the open unit square."""
    t = torch.arange(1, inner + 1, dtype=torch.float64) / (inner + 1)
    return torch.cartesian_prod(t, t)


def edges(points: int) -> Tensor:
    """Return the given number of points on each side of the unit square."""
    t = torch.arange(1, points + 1, dtype=torch.float64) / (points + 1)
    sides = (t, 0 * t), (t, 1 + 0 * t), (0 * t, t), (1 + 0 * t, t)
    return torch.cat([torch.stack(side, dim=1) for side in sides])


class Ansatz(nn.Module):
    """u(x) = v' tanh(W x + b) + c, in float64."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (HIDDEN, 2), (HIDDEN,), (HIDDEN,), ()
        W, b, v, c = (nn.Parameter(0.1 * torch.randn(s, dtype=torch.float64)) for s in sizes)
        self.W, self.b, self.v, self.c = W, b, v, c

    def forward(self, x: Tensor) -> Tensor:
        """Return u at points (n, 2)."""
        return torch.tanh(x @ self.W.T + self.b) @ self.v + self.c

    def laplacian(self, x: Tensor) -> Tensor:
        """Return the Laplacian of u at points (n, 2); tanh'' is -2 tanh (1 - tanh^2)."""
        h = torch.tanh(x @ self.W.T + self.b)
        return (-2 * h * (1 - h * h)) @ (self.v * self.W.square().sum(1))


class Energy(nn.Module):
    """An ansatz and its residuals at fixed points."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.ansatz = Ansatz()
        self.inside, self.boundary = grid(POINTS), edges(POINTS)
        self.source = 2 * math.pi**2 * solution(self.inside)

    def forward(self) -> Tensor:
        """Return the residuals, weighted so that their mean square is twice the energy.

        It is the mean square inside plus that on the boundary times its length, 4.
        """
        inside = self.ansatz.laplacian(self.inside) + self.source
        boundary = self.ansatz(self.boundary)
        total = len(inside) + len(boundary)
        weights = math.sqrt(total / len(inside)), math.sqrt(4 * total / len(boundary))
        return torch.cat([weights[0] * inside, weights[1] * boundary])

    def closure(self) -> tuple[Tensor, Normal]:
        """Return the loss, and the Normal whose Fisher matrix is the metric of the energy."""
        residuals = self()
        return 0.5 * residuals.square().mean(), Normal(residuals, torch.ones_like(residuals))

    def losses(self, thetas: Tensor) -> Tensor:
        """Return the loss for each row of parameters."""
        parameters = dict(self.named_parameters())

        def loss(theta: Tensor) -> Tensor:
            parts = theta.split([p.numel() for p in parameters.values()])
            views = (part.view_as(p) for part, p in zip(parts, parameters.values(), strict=True))
            named = dict(zip(parameters, views, strict=True))
            return 0.5 * functional_call(self, named, ()).square().mean()

        return vmap(loss)(thetas)


@torch.no_grad()
def error(energy: Energy, points: int = 100) -> float:
    """Return the relative L2 error of u on points that were not used in training."""
    x = grid(points)
    truth = solution(x)
    return ((energy.ansatz(x) - truth).norm() / truth.norm()).item()


def natural_gradients(energy: Energy, damped: bool) -> Tensor:
    """Return the natural gradient without the noise, or one per damping, as rows."""
    _, prediction = energy.closure()
    R = FisherOperator(prediction, energy.parameters()).root()
    columns = torch.stack([R.mv(unit) for unit in torch.eye(R.shape[1], dtype=R.dtype)], dim=1)
    mean = prediction.loc.detach()
    y = R.lift(torch.cat([mean, torch.zeros_like(mean)]) / len(mean))  # of the loss, in mean, scale
    U, S, Vh = torch.linalg.svd(columns, full_matrices=False)
    sizes = S / S[0]
    if damped:
        shares = torch.stack([sizes**2 / (sizes**2 + damping**2) for damping in DAMPINGS])
    else:
        shares = (sizes > CUTOFF).double().unsqueeze(0)
    return (shares * (U.T @ y) / S) @ Vh


def energy_natural(energy: Energy) -> Updates:
    """Take the best length of the best natural gradient."""
    params = list(energy.parameters())
    step = 0
    while True:
        directions = natural_gradients(energy, step < WARM_UP)
        with torch.no_grad():
            theta = parameters_to_vector(params)
            trials = torch.cat([theta - LENGTHS[:, None] * d for d in directions])
            losses = energy.losses(torch.cat([theta.unsqueeze(0), trials]))
            best = int(losses.argmin())
            vector_to_parameters(trials[best - 1] if best else theta, params)
        step += 1
        yield


def marquardt(energy: Energy) -> Updates:
    """Take Levenberg-Marquardt steps."""
    optimizer = NewtonTrustRegion(
        energy.parameters(),
        math.inf,
        curvature="ggn",
        damping=1e-2,
        region=Region(damping_factor=4.0),
        max_iter=200,
        rtol=1e-6,
    )
    while True:
        optimizer.step(energy.closure)
        yield


def adam(energy: Energy, lr: float) -> Updates:
    """Take steps of Adam."""
    optimizer = torch.optim.Adam(energy.parameters(), lr)
    while True:
        optimizer.zero_grad()
        energy.closure()[0].backward()
        optimizer.step()
        yield


def lbfgs(energy: Energy) -> Updates:
    """Take steps of torch's L-BFGS with the strong Wolfe line search, of 20 iterations each."""
    optimizer = torch.optim.LBFGS(
        energy.parameters(),
        history_size=100,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = energy.closure()[0]
        loss.backward()
        return loss

    while True:
        optimizer.step(closure)  # pyright: ignore[reportArgumentType] # torch says float
        yield


def start(method: str, lr: float | None, energy: Energy) -> Updates:
    """Return the updates of a method."""
    if method == "Adam" and lr:
        return adam(energy, lr)
    return {
        "energy natural gradient": energy_natural,
        "Levenberg-Marquardt": marquardt,
        "L-BFGS": lbfgs,
    }[method](energy)


def train(method: str, lr: float | None, seed: int, steps: int, seconds: float) -> Run:
    """Train until the steps or the seconds are used up."""
    energy = Energy(seed)
    updates, clock, step = start(method, lr, energy), 0.0, 0
    rows = [(0, 0.0, error(energy))]
    while step < steps and clock < seconds:
        begin = time.process_time()
        next(updates)
        clock += time.process_time() - begin
        step += 1
        if step == steps or clock >= 1.02 * rows[-1][1]:
            rows.append((step, clock, error(energy)))
    return Run(lr, rows)


def table(runs: Runs) -> str:
    """Return a table of the final errors: median, lowest and highest."""
    lines = [" " * 26 + "lr    steps  seconds   median   lowest  highest   (relative L2 error)"]
    for name, group in runs.items():
        steps, seconds, _ = map(median, zip(*(run.final for run in group), strict=True))
        errors = sorted(run.final[2] for run in group)
        cells = "".join(f"{e:9.1e}" for e in (median(errors), errors[0], errors[-1]))
        lines.append(f"{name:<23}{group[0].lr or '-':>5}{steps:9.0f}{seconds:9.1f}{cells}")
    return "\n".join(lines)


def draw(runs: Runs, path: Path) -> None:
    """Draw the error of every run against seconds, and against the first hundred steps."""
    from matplotlib.figure import Figure  # imported late: training does not need it

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, group in runs.items():
        label = f"{name}, lr {group[0].lr}" if group[0].lr else name
        for i, run in enumerate(group):
            step, seconds, errors = zip(*run.rows, strict=True)
            style = {"color": COLOURS[name], "linewidth": 1.0, "label": None if i else label}
            left.plot(seconds[1:], errors[1:], **style)
            right.plot(step, errors, **style)
    left.set(xscale="log", yscale="log", xlabel="seconds", ylabel="relative L2 error")
    right.set(xlim=(0, 100), xlabel="steps (of 20 iterations: L-BFGS)")
    left.legend(frameon=False, fontsize="small", loc="lower left")
    save(figure, path)


def main(
    *,
    steps: int = 51,
    seeds: int = 5,
    times: float = 10.0,
    plot: Path = PLOT,
    quiet: bool = False,
) -> Runs:
    """Train, print a table, save the plot; return the runs of each method, one per seed."""
    ours, *others = COLOURS
    jobs = [(name, lr) for name in others for lr in (LRS if name == "Adam" else (None,))]
    train(ours, None, 0, 1, math.inf)  # the first steps in a process cost torch a second
    runs: dict[tuple[str, float | None], list[Run]] = {(ours, None): []} | {j: [] for j in jobs}
    for seed, job in tqdm(list(product(range(seeds), runs)), disable=quiet):
        own = runs[ours, None]
        limits = (10**9, times * own[seed].final[1]) if len(own) > seed else (steps, math.inf)
        runs[job].append(train(*job, seed, *limits))
    best: Runs = {}
    for name in COLOURS:
        groups = [group for (method, _), group in runs.items() if method == name]
        best[name] = min(groups, key=lambda group: median(run.final[2] for run in group))
    print(table(best))
    draw(best, plot)
    return best


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--steps", type=int, default=51, help="energy natural gradient steps")
    parser.add_argument("--seeds", type=int, default=5, help="number of first weights")
    parser.add_argument(
        "--times", type=float, default=10.0, help="how many times as long the others train"
    )
    parser.add_argument("--plot", type=Path, default=PLOT, help="where to save the plot")
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    torch.set_num_threads(1)  # Such small matrices gain nothing from more; timings vary less.
    main(**vars(parser.parse_args()))
