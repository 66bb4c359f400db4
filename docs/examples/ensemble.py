"""Take natural-gradient steps of a whole ensemble at once, with ``fixed_cg`` under ``vmap``.

Every member is a small tanh network that predicts the mean of a Normal of fixed noise, and is
fitted to its own bootstrap sample of one curve. A step solves ``(F + damping I) x = -g`` for all
members in one ``torch.func.vmap``, where each solve stops on its own, and scales each direction to
the edge of its own KL ball by the curvature that the solve returns. The same directions are also
computed one member after another with ``cg``, to compare times and the reductions that the models
predict. These reductions are well determined, and the tenth iterates are not: without
reorthogonalization their digits are amplified rounding.

Run ``python docs/examples/ensemble.py``; it takes about 20 s and saves a plot of the curves and
losses of the members. ``--help`` shows the options.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from race import Help, save
from torch import Tensor, nn
from torch.func import functional_call, jvp, stack_module_state, vjp, vmap
from tqdm import tqdm

from trustregion import cg
from trustregion.solvers import fixed_cg

NOISE, DELTA, DAMPING, ITERATIONS = 0.1, 0.3, 1.0, 10
LENGTHS = (1.0, 0.5, 0.25, 0.125, 0.0)
PLOT = Path(__file__).with_suffix(".png")

# torch 2.13 compiles its rules for jvp with a function that it has itself deprecated.
warnings.filterwarnings("ignore", ".torch.jit.script", DeprecationWarning)


class Ensemble:
    """Stacked members, each with a row of :attr:`theta` and a bootstrap sample."""

    def __init__(self, members: int, points: int = 200) -> None:
        torch.manual_seed(0)
        nets = [
            nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)) for _ in range(members)
        ]
        stacked, _ = stack_module_state(nets)
        self.net = nets[0]
        self.shapes = {name: p.shape[1:] for name, p in stacked.items()}
        self.theta = torch.cat([p.detach().flatten(1) for p in stacked.values()], dim=1)
        x = torch.rand(points, 1) * 4 - 2
        y = x * torch.sin(3 * x) + NOISE * torch.randn(points, 1)
        self.points = x, y
        chosen = torch.randint(points, (members, points))
        self.x, self.y = x[chosen], y[chosen]

    def mean(self, x: Tensor, theta: Tensor) -> Tensor:
        """Return the predictions of one member."""
        parts = theta.split([shape.numel() for shape in self.shapes.values()])
        named = zip(self.shapes.items(), parts, strict=True)
        return functional_call(self.net, {n: t.view(shape) for (n, shape), t in named}, (x,))

    def system(
        self, theta: Tensor, x: Tensor, y: Tensor
    ) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
        """Return ``v -> (F + damping I) v``, the gradient and the loss of one member."""
        predict = partial(self.mean, x)
        mean, pullback = vjp(predict, theta)
        precision = 1 / (NOISE**2 * len(x))
        (g,) = pullback((mean - y) * precision)

        def damped_fisher(v: Tensor) -> Tensor:
            _, tangent = jvp(predict, (theta,), (v,))
            return pullback(tangent * precision)[0] + DAMPING * v

        return damped_fisher, g, 0.5 * precision * (mean - y).square().sum()


def to_the_edge(x: Tensor, curvature: Tensor) -> Tensor:
    """Scale a direction to the edge of the ball ``s'(F + damping I)s / 2 <= DELTA``."""
    return (2 * DELTA / curvature).sqrt().to(x.dtype) * x


def direction(
    ensemble: Ensemble, theta: Tensor, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a member's step, model value and loss, without branches on values, for ``vmap``."""
    A, g, loss = ensemble.system(theta, x, y)
    solution = fixed_cg(A, -g, ITERATIONS)
    return to_the_edge(solution.x, solution.curvature), solution.model_value, loss


def value_alone(ensemble: Ensemble, theta: Tensor, x: Tensor, y: Tensor) -> float:
    """Return the model value that ``cg`` reaches for the same member."""
    A, g, _ = ensemble.system(theta, x, y)
    return cg(A, -g, rtol=0.0, max_iter=ITERATIONS).model_value


def shortened(ensemble: Ensemble, theta: Tensor, s: Tensor) -> Tensor:
    """Return the parameters of all members after the best of five lengths of their steps."""
    losses = [
        (vmap(ensemble.mean)(ensemble.x, theta + length * s) - ensemble.y).square().sum((1, 2))
        for length in LENGTHS
    ]
    best = torch.tensor(LENGTHS)[torch.stack(losses).argmin(0)]
    return theta + best[:, None] * s


def draw(ensemble: Ensemble, theta: Tensor, losses: list[Tensor], path: Path) -> None:
    """Draw the data, the curve of each member and their spread, and the losses against steps."""
    from matplotlib.figure import Figure  # imported late: training does not need it

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    grid = torch.linspace(-2.5, 2.5, 301).unsqueeze(-1)
    curves = vmap(partial(ensemble.mean, grid))(theta).squeeze(-1)
    spread, middle = torch.std_mean(curves, dim=0)
    x, blue = grid[:, 0], "#0072B2"
    left.plot(x, curves.T, color=blue, alpha=0.2, linewidth=0.6)
    band = {"color": "#D55E00", "zorder": 3}
    left.fill_between(x, middle - 2 * spread, middle + 2 * spread, **band, alpha=0.25, linewidth=0)
    left.plot(x, middle, **band, label="mean of the members, and two standard deviations")
    left.scatter(*ensemble.points, s=3, color="0.3", zorder=2, label="data")
    left.set(ylim=(-3, 3), xlabel="x")
    left.set_title(f"{len(theta)} members after {len(losses)} steps", fontsize="medium")
    left.legend(frameon=False, fontsize="small", loc="upper left")
    each = torch.stack(losses)
    right.fill_between(range(len(each)), each.amin(1), each.amax(1), color=blue, alpha=0.2)
    right.plot(each.mean(1), color=blue, label="mean, and range from lowest to highest")
    right.axhline(0.5, color="black", linewidth=1, linestyle=":", label="loss of the noise alone")
    right.set(yscale="log", xlabel="steps", ylabel="loss (nats per point)")
    right.legend(frameon=False, fontsize="small")
    save(figure, path)


@torch.no_grad()
def main(
    steps: int = 30, members: int = 64, plot: Path = PLOT, quiet: bool = False
) -> dict[str, float]:
    """Train the ensemble, and compute the directions one member after another for comparison."""
    torch.set_num_threads(1)  # These products are too small for two.
    ensemble = Ensemble(members)
    theta, data = ensemble.theta, (ensemble.x, ensemble.y)
    all_directions = vmap(partial(direction, ensemble))
    losses, together, apart, gaps = [], [], [], []
    all_directions(theta, *data)  # warm up
    for _ in tqdm(range(steps), unit="step", disable=quiet):
        start = time.perf_counter()
        s, value, loss = all_directions(theta, *data)
        middle = time.perf_counter()
        alone = [value_alone(ensemble, *member) for member in zip(theta, *data, strict=True)]
        apart.append(time.perf_counter() - middle)
        together.append(middle - start)
        losses.append(loss)
        gaps.append((value / torch.tensor(alone) - 1).abs().max().item())
        theta = shortened(ensemble, theta, s)
    result = {
        "loss at the first step": losses[0].mean().item(),
        "loss at the last": losses[-1].mean().item(),
        "ms for all, together": 1e3 * median(together),
        "ms for all, one by one": 1e3 * median(apart),
        "times faster": median(b / a for a, b in zip(together, apart, strict=True)),
        "values differ by": max(gaps),
    }
    for name, value in result.items():
        print(f"{name:24} {value:.3g}")
    draw(ensemble, theta, losses, plot)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--steps", type=int, default=30, help="number of steps")
    parser.add_argument("--members", type=int, default=64, help="number of networks")
    parser.add_argument("--plot", type=Path, default=PLOT, help="where to save the plot")
    main(**vars(parser.parse_args()))
