"""Nonlinear least squares by Levenberg-Marquardt, against scipy, where the answers are certified.

The problems are ten of the Statistical Reference Datasets (StRD) of the National Institute of
Standards and Technology (NIST), whose parameters are certified to 11 digits. Each is fitted from
both of the starting points given there. A data set is used only if the certified parameters
reproduce the certified residual sum of squares. In MGH10 one parameter is a million times another,
so the fit is written without units: parameters are multiples of their first guess, and the loss is
the fraction of unexplained variance. A damping of 1 is then a sensible start. "Marquardt's scaling"
keeps the units and takes the diagonal of the Gauss-Newton matrix as the metric. scipy's ``lm`` is
MINPACK, and its ``trf`` is a trust-region method; both get exact Jacobians and ``x_scale="jac"``.

The score of an answer is the number of digits that its worst parameter shares with the certified
one. Our fits end with the first step that changes no digit, because none is left to change or
because no step is better.

Run ``python docs/examples/curve_fitting.py``; it takes under a minute.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from race import Help, save
from torch import Tensor
from torch.func import jacrev
from torch.nn.functional import mse_loss
from tqdm import tqdm

from trustregion import Jacobi, NewtonTrustRegion, StepInfo
from trustregion.optim import Region

LIMIT = 1000  # on our steps, and on scipy's evaluations
MOST = 11.0  # certified digits
ENOUGH = 6.0  # digits at which a problem counts as solved
PLOT = Path(__file__).with_suffix(".png")

Model = Callable[[Tensor, Tensor], Tensor]


class Problem(NamedTuple):
    """A model, its data, two starting points, and the certified answer."""

    model: Model  # (parameters, x) -> y
    x: tuple[float, ...]
    y: tuple[float, ...]
    starts: tuple[tuple[float, ...], tuple[float, ...]]
    certified: tuple[float, ...]
    rss: float  # the residual sum of squares there


def saturation(b: Tensor, x: Tensor) -> Tensor:
    """Return the model of Misra1a and BoxBOD."""
    return b[0] * (1 - torch.exp(-b[1] * x))


def three_exponentials(b: Tensor, x: Tensor) -> Tensor:
    """Return the model of Lanczos3."""
    return (b[0::2, None] * torch.exp(-b[1::2, None] * x)).sum(0)


def two_exponentials(b: Tensor, x: Tensor) -> Tensor:
    """Return the model of MGH17."""
    return b[0] + b[1] * torch.exp(-b[3] * x) + b[2] * torch.exp(-b[4] * x)


def logistic(b: Tensor, x: Tensor) -> Tensor:
    """Return the model of Rat42."""
    return b[0] / (1 + torch.exp(b[1] - b[2] * x))


def richards(b: Tensor, x: Tensor) -> Tensor:
    """Return the model of Rat43."""
    return b[0] / (1 + torch.exp(b[1] - b[2] * x)) ** (1 / b[3])


def thermistor(b: Tensor, x: Tensor) -> Tensor:
    """Return the model of MGH10."""
    return b[0] * torch.exp(b[1] / (x + b[2]))


def enzyme(b: Tensor, x: Tensor) -> Tensor:
    """Return the model of MGH09."""
    return b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3])


def cubics(b: Tensor, x: Tensor) -> Tensor:
    """Return the model of Thurber."""
    above = b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3
    return above / (1 + b[4] * x + b[5] * x**2 + b[6] * x**3)


def peak(b: Tensor, x: Tensor) -> Tensor:
    """Return the model of Eckerle4."""
    return b[0] / b[1] * torch.exp(-0.5 * ((x - b[2]) / b[1]) ** 2)


# fmt: off
PROBLEMS = {
    "Misra1a": Problem(
        saturation,
        (77.6, 114.9, 141.1, 190.8, 239.9, 289.0, 332.8, 378.4, 434.8, 477.3, 536.8, 593.1, 689.1,
         760.0),
        (10.07, 14.73, 17.94, 23.93, 29.61, 35.18, 40.02, 44.82, 50.76, 55.05, 61.01, 66.40, 75.47,
         81.78),
        ((500, 1e-4), (250, 5e-4)),
        (2.3894212918e02, 5.5015643181e-04),
        1.2455138894e-01,
    ),
    "Lanczos3": Problem(
        three_exponentials,
        tuple(i / 20 for i in range(24)),
        (2.5134, 2.0443, 1.6684, 1.3664, 1.1232, 0.9269, 0.7679, 0.6389, 0.5338, 0.4479, 0.3776,
         0.3197, 0.2720, 0.2325, 0.1997, 0.1723, 0.1493, 0.1301, 0.1138, 0.1000, 0.0883, 0.0783,
         0.0698, 0.0624),
        ((1.2, 0.3, 5.6, 5.5, 6.5, 7.6), (0.5, 0.7, 3.6, 4.2, 4, 6.3)),
        (8.6816414977e-02, 9.5498101505e-01, 8.4400777463e-01, 2.9515951832e00, 1.5825685901e00,
         4.9863565084e00),
        1.6117193594e-08,
    ),
    "MGH17": Problem(
        two_exponentials,
        tuple(10.0 * i for i in range(33)),
        (0.844, 0.908, 0.932, 0.936, 0.925, 0.908, 0.881, 0.850, 0.818, 0.784, 0.751, 0.718, 0.685,
         0.658, 0.628, 0.603, 0.580, 0.558, 0.538, 0.522, 0.506, 0.490, 0.478, 0.467, 0.457, 0.448,
         0.438, 0.431, 0.424, 0.420, 0.414, 0.411, 0.406),
        ((50, 150, -100, 1, 2), (0.5, 1.5, -1, 0.01, 0.02)),
        (3.7541005211e-01, 1.9358469127e00, -1.4646871366e00, 1.2867534640e-02, 2.2122699662e-02),
        5.4648946975e-05,
    ),
    "Rat42": Problem(
        logistic,
        (9, 14, 21, 28, 42, 57, 63, 70, 79),
        (8.93, 10.80, 18.59, 22.33, 39.35, 56.11, 61.73, 64.62, 67.08),
        ((100, 1, 0.1), (75, 2.5, 0.07)),
        (7.2462237576e01, 2.6180768402e00, 6.7359200066e-02),
        8.0565229338e00,
    ),
    "MGH10": Problem(
        thermistor,
        tuple(50.0 + 5 * i for i in range(16)),
        (34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820,
         3307, 2872),
        ((2, 400000, 25000), (0.02, 4000, 250)),
        (5.6096364710e-03, 6.1813463463e03, 3.4522363462e02),
        8.7945855171e01,
    ),
    "BoxBOD": Problem(
        saturation,
        (1, 2, 3, 5, 7, 10),
        (109, 149, 149, 191, 213, 224),
        ((1, 1), (100, 0.75)),
        (2.1380940889e02, 5.4723748542e-01),
        1.1680088766e03,
    ),
    "MGH09": Problem(
        enzyme,
        (4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625),
        (0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246),
        ((25, 39, 41.5, 39), (0.25, 0.39, 0.415, 0.39)),
        (1.9280693458e-01, 1.9128232873e-01, 1.2305650693e-01, 1.3606233068e-01),
        3.0750560385e-04,
    ),
    "Thurber": Problem(
        cubics,
        (-3.067, -2.981, -2.921, -2.912, -2.840, -2.797, -2.702, -2.699, -2.633, -2.481, -2.363,
         -2.322, -1.501, -1.460, -1.274, -1.212, -1.100, -1.046, -0.915, -0.714, -0.566, -0.545,
         -0.400, -0.309, -0.109, -0.103, 0.010, 0.119, 0.377, 0.790, 0.963, 1.006, 1.115, 1.572,
         1.841, 2.047, 2.200),
        (80.574, 84.248, 87.264, 87.195, 89.076, 89.608, 89.868, 90.101, 92.405, 95.854, 100.696,
         101.060, 401.672, 390.724, 567.534, 635.316, 733.054, 759.087, 894.206, 990.785, 1090.109,
         1080.914, 1122.643, 1178.351, 1260.531, 1273.514, 1288.339, 1327.543, 1353.863, 1414.509,
         1425.208, 1421.384, 1442.962, 1464.350, 1468.705, 1447.894, 1457.628),
        ((1000, 1000, 400, 40, 0.7, 0.3, 0.03), (1300, 1500, 500, 75, 1, 0.4, 0.05)),
        (1.2881396800e03, 1.4910792535e03, 5.8323836877e02, 7.5416644291e01, 9.6629502864e-01,
         3.9797285797e-01, 4.9727297349e-02),
        5.6427082397e03,
    ),
    "Eckerle4": Problem(
        peak,
        (400, 405, 410, 415, 420, 425, 430, 435, 436.5, 438, 439.5, 441, 442.5, 444, 445.5, 447,
         448.5, 450, 451.5, 453, 454.5, 456, 457.5, 459, 460.5, 462, 463.5, 465, 470, 475, 480, 485,
         490, 495, 500),
        (0.0001575, 0.0001699, 0.0002350, 0.0003102, 0.0004917, 0.0008710, 0.0017418, 0.0046400,
         0.0065895, 0.0097302, 0.0149002, 0.0237310, 0.0401683, 0.0712559, 0.1264458, 0.2073413,
         0.2902366, 0.3445623, 0.3698049, 0.3668534, 0.3106727, 0.2078154, 0.1164354, 0.0616764,
         0.0337200, 0.0194023, 0.0117831, 0.0074357, 0.0022732, 0.0008800, 0.0004579, 0.0002345,
         0.0001586, 0.0001143, 0.0000710),
        ((1, 10, 500), (1.5, 5, 450)),
        (1.5543827178e00, 4.0888321754e00, 4.5154121844e02),
        1.4635887487e-03,
    ),
    "Rat43": Problem(
        richards,
        tuple(float(i) for i in range(1, 16)),
        (16.08, 33.83, 65.80, 97.20, 191.55, 326.20, 386.87, 520.53, 590.03, 651.92, 724.93, 699.56,
         689.96, 637.56, 717.41),
        ((100, 10, 1, 1), (700, 5, 0.75, 1.3)),
        (6.9964151270e02, 5.2771253025e00, 7.5962938329e-01, 1.2792483859e00),
        8.7864049080e03,
    ),
}
# fmt: on


class Fit(NamedTuple):
    """An answer and its cost."""

    parameters: Tensor
    steps: int  # the number of Gauss-Newton matrices or Jacobians
    evaluations: int  # evaluations of the model
    products: int  # products with Gauss-Newton matrices; 0 where a Jacobian is formed
    seconds: float  # processor seconds
    digits: float


def numbers(values: tuple[float, ...]) -> Tensor:
    """Return a tensor in float64."""
    return torch.tensor(values, dtype=torch.float64)


def verified(problem: Problem) -> float:
    """Return the relative error of the residual sum of squares at the certified parameters."""
    residuals = problem.model(numbers(problem.certified), numbers(problem.x)) - numbers(problem.y)
    return abs(residuals.square().sum().item() / problem.rss - 1)


def digits(parameters: Tensor, problem: Problem) -> float:
    """Return the number of right digits of the worst parameter: minus the log relative error."""
    certified = numbers(problem.certified)
    error = ((parameters - certified) / certified).abs().max().item()
    return min(max(0.0, -math.log10(error)), MOST) if error else MOST  # A NaN has no right digits.


def levenberg_marquardt(
    problem: Problem, start: Tensor, unit: Tensor, options: dict[str, Any]
) -> Fit:
    """Fit parameters that are measured in the given units."""
    x, y = numbers(problem.x), numbers(problem.y)
    w = (start / unit).requires_grad_()
    variance = y.var()
    optimizer = NewtonTrustRegion(
        [w],
        math.inf,
        curvature="ggn",
        damping=1.0,
        region=Region(damping_factor=4.0),
        rtol=1e-12,  # An exact solve takes at most as many products as there are parameters.
        **options,
    )

    def closure() -> tuple[Tensor, Tensor]:
        prediction = problem.model(unit * w, x)
        return mse_loss(prediction, y) / variance, prediction

    infos: list[StepInfo] = []
    moves, begin = True, time.process_time()
    while moves and len(infos) < LIMIT:
        before = w.detach().clone()
        optimizer.step(closure)
        infos.extend([optimizer.info] if optimizer.info else [])
        moves = bool(((w - before).abs() > 1e-13 * w.abs()).any())
    seconds = time.process_time() - begin
    evaluations = sum(info.evaluations for info in infos)
    products = sum(info.products for info in infos)
    b = (unit * w).detach()
    return Fit(b, len(infos), evaluations, products, seconds, digits(b, problem))


def ours(problem: Problem, start: Tensor) -> Fit:
    """Fit in units of the first guess."""
    return levenberg_marquardt(problem, start, start, {})


def marquardt(problem: Problem, start: Tensor) -> Fit:
    """Fit the parameters without units, in the metric of the diagonal."""
    scaling = {"preconditioner": Jacobi(1.0, probes="exact")}
    return levenberg_marquardt(problem, start, torch.ones_like(start), scaling)


def scipy_fit(problem: Problem, start: Tensor, method: str) -> Fit:
    """Fit with scipy, as far as rounding allows."""
    from scipy.optimize import least_squares  # imported late: only this method needs it

    x, y = numbers(problem.x), numbers(problem.y)

    def residuals(b: Any) -> Any:
        return (problem.model(torch.as_tensor(b), x) - y).numpy()

    def jacobian(b: Any) -> Any:
        return jacrev(lambda b: problem.model(b, x))(torch.as_tensor(b)).numpy()

    begin = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy rejects a trial that overflows
        found = least_squares(
            residuals,
            start.numpy(),
            jacobian,  # pyright: ignore[reportArgumentType] # scipy says str
            method=method,
            x_scale="jac",
            xtol=1e-15,
            ftol=1e-15,
            gtol=1e-15,
            max_nfev=LIMIT,
        )
    seconds = time.process_time() - begin
    b = torch.as_tensor(found.x)
    return Fit(b, found.njev, found.nfev, 0, seconds, digits(b, problem))


METHODS: dict[str, Callable[[Problem, Tensor], Fit]] = {
    "Levenberg-Marquardt": ours,
    "Marquardt's scaling": marquardt,
    "scipy lm": lambda problem, start: scipy_fit(problem, start, "lm"),
    "scipy trf": lambda problem, start: scipy_fit(problem, start, "trf"),
}

Fits = dict[str, dict[tuple[str, int], Fit]]  # for each method, by problem and starting point


def table(fits: Fits) -> str:
    """Return a table of every fit, including failures, and of the totals of each method."""
    width = 23
    lines = [" " * 10 + "".join(f"{name:>{width}}" for name in fits)]
    lines.append("problem   " + len(fits) * f"{'steps  evals  digits':>{width}}")
    for name, start in next(iter(fits.values())):
        row = (group[name, start] for group in fits.values())
        cells = (f"{fit.steps:8}{fit.evaluations:7}{fit.digits:8.1f}" for fit in row)
        lines.append(f"{name:<9}{start}" + "".join(cells))
    lines.append(f"{'in all':<23}solved  steps  evals  products  seconds")
    for name, group in fits.items():
        solved = f"{sum(fit.digits >= ENOUGH for fit in group.values())} of {len(group)}"
        sums = map(sum, zip(*(fit[1:5] for fit in group.values()), strict=True))
        steps, evaluations, products, seconds = sums
        counts = f"{steps:7}{evaluations:7}{products or '-':>10}{seconds:9.2f}"
        lines.append(f"{name:<20}{solved:>9}{counts}")
    return "\n".join(lines)


def draw(fits: dict[tuple[str, int], Fit], path: Path) -> None:
    """Draw the data of each problem, its first starting point, and the fit from there."""
    from matplotlib.figure import Figure  # imported late: fitting does not need it

    names = [name for name, start in fits if start == 1]
    columns = min(len(names), 5)
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(max(2.2 * columns, 3.0), 2.4 * rows), layout="constrained")
    for place, name in enumerate(names, 1):
        ax = figure.add_subplot(rows, columns, place)
        problem, fit = PROBLEMS[name], fits[name, 1]
        x, y = numbers(problem.x), numbers(problem.y)
        grid = torch.linspace(x.min().item(), x.max().item(), 300, dtype=torch.float64)
        ax.plot(grid, problem.model(numbers(problem.starts[0]), grid), color="#D55E00", ls="--")
        ax.plot(grid, problem.model(fit.parameters, grid), color="#0072B2")
        ax.scatter(x, y, s=8, color="0.3", zorder=3)
        low, high = y.min().item(), y.max().item()
        ax.set(ylim=(low - 0.3 * (high - low), high + 0.3 * (high - low)))
        ax.set_title(f"{name}: {fit.steps} steps, {fit.digits:.1f} digits", fontsize="small")
        ax.tick_params(labelsize="x-small")
    save(figure, path)


def main(
    *, names: tuple[str, ...] = tuple(PROBLEMS), plot: Path = PLOT, quiet: bool = False
) -> Fits:
    """Check the data, fit, print a table, save the plot; return the fits of each method."""
    worst = max(verified(PROBLEMS[name]) for name in names)
    if worst > 1e-10:
        raise ValueError(f"the data do not reproduce the certified sum of squares: {worst:.1e} off")
    print(f"certified sums of squares reproduced to {-math.log10(worst):.1f} digits or more")
    jobs = [(name, start) for name in names for start in (1, 2)]
    fits: Fits = {method: {} for method in METHODS}
    for name, start in tqdm(jobs, disable=quiet):
        problem = PROBLEMS[name]
        for method, fit in METHODS.items():
            fits[method][name, start] = fit(problem, numbers(problem.starts[start - 1]))
    print(table(fits))
    draw(fits["Levenberg-Marquardt"], plot)
    return fits


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument(
        "--names",
        nargs="+",
        choices=PROBLEMS,
        default=tuple(PROBLEMS),
        metavar="NAME",
        help="problems to fit",
    )
    parser.add_argument("--plot", type=Path, default=PLOT, help="where to save the plot")
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    torch.set_num_threads(1)  # The tensors are tiny.
    main(**vars(parser.parse_args()))
