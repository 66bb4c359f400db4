"""Test problems of More, Garbow and Hillstrom (1981), and Himmelblau's function, in torch.

More, Garbow and Hillstrom, Testing Unconstrained Optimization Software, ACM TOMS 7(1), 1981: the
sums of squares, the starting points and the known values of minima, by the numbers of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

DTYPE = torch.float64


@dataclass(frozen=True)
class Problem:
    """A sum of squares.

    Attributes:
        name: with its number in the paper.
        residuals: ``x`` of shape ``(n,)`` -> residuals of shape ``(m,)``.
        start: the standard starting point.
        minima: values at known local minima, lowest first.
        tolerance: on the norm of the gradient.

    """

    name: str
    residuals: Callable[[Tensor], Tensor]
    start: Tensor
    minima: tuple[float, ...] = (0.0,)
    tolerance: float = 1e-8

    def value(self, x: Tensor) -> Tensor:
        return self.residuals(x).square().sum()


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DTYPE)


def count(first: int, last: int) -> Tensor:
    return torch.arange(first, last + 1, dtype=DTYPE)


def rosenbrock(x: Tensor) -> Tensor:
    """Return those of any even dimension: pairs of coordinates, each a valley of its own."""
    odd, even = x[::2], x[1::2]
    return torch.cat([10 * (even - odd**2), 1 - odd])


def freudenstein_roth(x: Tensor) -> Tensor:
    a, b = x
    return torch.stack([-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b])


def powell_badly_scaled(x: Tensor) -> Tensor:
    a, b = x
    return torch.stack([1e4 * a * b - 1, (-a).exp() + (-b).exp() - 1.0001])


def brown_badly_scaled(x: Tensor) -> Tensor:
    a, b = x
    return torch.stack([a - 1e6, b - 2e-6, a * b - 2])


def beale(x: Tensor) -> Tensor:
    return numbers(1.5, 2.25, 2.625) - x[0] * (1 - x[1] ** count(1, 3))


def jennrich_sampson(x: Tensor) -> Tensor:
    i = count(1, 10)
    return 2 + 2 * i - ((i * x[0]).exp() + (i * x[1]).exp())


def helical_valley(x: Tensor) -> Tensor:
    a, b, c = x
    theta = torch.atan2(b, a) / (2 * math.pi)
    theta = theta + (theta < -0.25)  # the branch of the paper: cut along a = 0, b < 0
    return torch.stack([10 * (c - 10 * theta), 10 * (torch.hypot(a, b) - 1), c])


BARD = numbers(
    0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39
)


def bard(x: Tensor) -> Tensor:
    u = count(1, 15)
    v = 16 - u
    return BARD - (x[0] + u / (v * x[1] + torch.minimum(u, v) * x[2]))


HALF_BELL = numbers(0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521)
BELL = torch.cat([HALF_BELL, numbers(0.3989), HALF_BELL.flip(0)])


def gaussian(x: Tensor) -> Tensor:
    t = (8 - count(1, 15)) / 2
    return x[0] * (-x[1] * (t - x[2]) ** 2 / 2).exp() - BELL


def box(x: Tensor) -> Tensor:
    t = count(1, 10) / 10
    return (-t * x[0]).exp() - (-t * x[1]).exp() - x[2] * ((-t).exp() - (-10 * t).exp())


def powell_singular(x: Tensor) -> Tensor:
    """Return those of any dimension that four divides; the Hessian is singular at the minimum."""
    a, b, c, d = x.reshape(-1, 4).T
    parts = [a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2]
    return torch.cat(parts)


def wood(x: Tensor) -> Tensor:
    a, b, c, d = x
    return torch.stack(
        [
            10 * (b - a**2),
            1 - a,
            90**0.5 * (d - c**2),
            1 - c,
            10**0.5 * (b + d - 2),
            0.1**0.5 * (b - d),
        ]
    )


KOWALIK_Y = numbers(
    0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246
)
KOWALIK_U = numbers(4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625)


def kowalik_osborne(x: Tensor) -> Tensor:
    u = KOWALIK_U
    return KOWALIK_Y - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def brown_dennis(x: Tensor) -> Tensor:
    t = count(1, 20) / 5
    return (x[0] + t * x[1] - t.exp()) ** 2 + (x[2] + x[3] * t.sin() - t.cos()) ** 2


def biggs(x: Tensor) -> Tensor:
    t = count(1, 13) / 10
    y = (-t).exp() - 5 * (-10 * t).exp() + 3 * (-4 * t).exp()
    fit = x[2] * (-t * x[0]).exp() - x[3] * (-t * x[1]).exp() + x[5] * (-t * x[4]).exp()
    return fit - y


def watson(x: Tensor) -> Tensor:
    t, j = count(1, 29).unsqueeze(1) / 29, count(1, len(x))
    slope = (t ** (j[1:] - 2)) @ ((j[1:] - 1) * x[1:])
    rest = torch.stack([x[0], x[1] - x[0] ** 2 - 1])
    return torch.cat([slope - ((t ** (j - 1)) @ x) ** 2 - 1, rest])


def penalty_1(x: Tensor) -> Tensor:
    return torch.cat([1e-5**0.5 * (x - 1), (x @ x - 0.25).reshape(1)])


def penalty_2(x: Tensor) -> Tensor:
    n, a = len(x), 1e-5**0.5
    i, e = count(2, n), (x / 10).exp()
    y = (i / 10).exp() + ((i - 1) / 10).exp()
    last = (count(1, n).flip(0) @ x**2 - 1).reshape(1)
    first = (x[0] - 0.2).reshape(1)
    return torch.cat([first, a * (e[1:] + e[:-1] - y), a * (e[1:] - math.exp(-0.1)), last])


def variably_dimensioned(x: Tensor) -> Tensor:
    s = count(1, len(x)) @ (x - 1)
    return torch.cat([x - 1, torch.stack([s, s**2])])


def trigonometric(x: Tensor) -> Tensor:
    n = len(x)
    return n - x.cos().sum() + count(1, n) * (1 - x.cos()) - x.sin()


def brown_almost_linear(x: Tensor) -> Tensor:
    return torch.cat([x[:-1] + x.sum() - (len(x) + 1), (x.prod() - 1).reshape(1)])


def _neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    zero = x.new_zeros(1)
    return torch.cat([zero, x[:-1]]), torch.cat([x[1:], zero])


def boundary_value(x: Tensor) -> Tensor:
    h = 1 / (len(x) + 1)
    left, right = _neighbours(x)
    return 2 * x - left - right + h**2 * (x + h * count(1, len(x)) + 1) ** 3 / 2


def integral_equation(x: Tensor) -> Tensor:
    h = 1 / (len(x) + 1)
    t = h * count(1, len(x))
    cubes = (x + t + 1) ** 3
    below = t.unsqueeze(0) <= t.unsqueeze(1)
    kernel = torch.where(below, t.outer(1 - t).T, t.outer(1 - t))
    return x + h / 2 * kernel @ cubes


def broyden_tridiagonal(x: Tensor) -> Tensor:
    left, right = _neighbours(x)
    return (3 - 2 * x) * x - left - 2 * right + 1


def broyden_banded(x: Tensor) -> Tensor:
    i = count(1, len(x))
    offset = i.unsqueeze(0) - i.unsqueeze(1)  # of the column from the row
    near = ((offset >= -5) & (offset <= 1) & (offset != 0)).to(x)
    return x * (2 + 5 * x**2) + 1 - near @ (x * (1 + x))


def chebyquad(x: Tensor) -> Tensor:
    y = 2 * x - 1
    before, now, means = torch.ones_like(y), y, []
    for i in range(1, len(x) + 1):
        integral = -1 / (i * i - 1) if i % 2 == 0 else 0.0
        means.append(now.mean() - integral)
        before, now = now, 2 * y * now - before
    return torch.stack(means)


def himmelblau(x: Tensor) -> Tensor:
    a, b = x
    return torch.stack([a**2 + b - 11, a + b**2 - 7])


def problems(*, absolute: bool = False) -> list[Problem]:
    """Return the problems, in the order of the paper.

    The tolerance is relative to the loss at the minimum where that is above 1, unless ``absolute``:
    no gradient can be made as small as a fixed number where the loss is large and rounded.
    """
    if absolute:
        return _all()
    return [replace(p, tolerance=p.tolerance * max(1.0, p.minima[0])) for p in _all()]


def _all() -> list[Problem]:
    grid = count(1, 10) / 11
    return [
        Problem("Himmelblau", himmelblau, numbers(0, 0)),
        Problem("1 Rosenbrock", rosenbrock, numbers(-1.2, 1)),
        Problem("2 Freudenstein-Roth", freudenstein_roth, numbers(0.5, -2), (0.0, 48.9842)),
        Problem("3 Powell badly scaled", powell_badly_scaled, numbers(0, 1)),
        Problem("4 Brown badly scaled", brown_badly_scaled, numbers(1, 1)),
        Problem("5 Beale", beale, numbers(1, 1)),
        Problem("6 Jennrich-Sampson", jennrich_sampson, numbers(0.3, 0.4), (124.362,)),
        Problem("7 helical valley", helical_valley, numbers(-1, 0, 0)),
        Problem("8 Bard", bard, numbers(1, 1, 1), (8.21487e-3, 17.4286)),
        Problem("9 Gaussian", gaussian, numbers(0.4, 1, 0), (1.12793e-8,)),
        Problem("12 Box 3-D", box, numbers(0, 10, 20), (0.0, 0.0755887)),
        Problem("13 Powell singular", powell_singular, numbers(3, -1, 0, 1)),
        Problem("14 Wood", wood, numbers(-3, -1, -3, -1)),
        Problem(
            "15 Kowalik-Osborne",
            kowalik_osborne,
            numbers(0.25, 0.39, 0.415, 0.39),
            (3.07505e-4, 1.02734e-3),
        ),
        Problem("16 Brown-Dennis", brown_dennis, numbers(25, 5, -5, -1), (85822.2,)),
        Problem("18 Biggs EXP6", biggs, numbers(1, 2, 1, 1, 1, 1), (0.0, 5.65565e-3)),
        Problem("20 Watson, n = 9", watson, torch.zeros(9, dtype=DTYPE), (1.39976e-6,)),
        Problem("21 ext. Rosenbrock, n = 100", rosenbrock, numbers(-1.2, 1).repeat(50)),
        Problem("22 ext. Powell, n = 100", powell_singular, numbers(3, -1, 0, 1).repeat(25)),
        Problem("23 penalty I, n = 10", penalty_1, count(1, 10), (7.08765e-5,)),
        Problem("24 penalty II, n = 10", penalty_2, numbers(0.5).repeat(10), (2.93660e-4,)),
        Problem("25 variably dim., n = 10", variably_dimensioned, 1 - count(1, 10) / 10),
        Problem(
            "26 trigonometric, n = 10", trigonometric, numbers(0.1).repeat(10), (0.0, 2.79506e-5)
        ),
        Problem(
            "27 Brown almost-linear, n = 10",
            brown_almost_linear,
            numbers(0.5).repeat(10),
            (0.0, 1.0),
        ),
        Problem("28 boundary value, n = 10", boundary_value, grid * (grid - 1)),
        Problem("29 integral equation, n = 10", integral_equation, grid * (grid - 1)),
        Problem("30 Broyden tridiagonal, n = 10", broyden_tridiagonal, numbers(-1).repeat(10)),
        Problem("31 Broyden banded, n = 10", broyden_banded, numbers(-1).repeat(10)),
        Problem("35 Chebyquad, n = 8", chebyquad, count(1, 8) / 9, (3.51687e-3,)),
    ]
