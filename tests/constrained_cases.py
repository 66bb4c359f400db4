"""Constrained problems that are drawn by their structure."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

import oracles
from strategies import System, systems
from trustregion.solvers.constrained import constrained_kl_ball_step


@dataclass(frozen=True)
class Constrained:
    """A system with constraints, whose values are given in units of the radius of the ball."""

    system: System
    delta: float
    a: Tensor
    b: Tensor

    @property
    def H(self):
        return self.system.exact

    @property
    def g(self):
        return self.system.b

    def step(self, **options):
        options = {"rtol": 1e-11, "max_iter": 1000, "A": self.system.A, "g": self.g, **options}
        options = {"delta": self.delta, "a": self.a, "b": self.b, **options}
        given = [options.pop(name) for name in ("A", "g", "delta", "a", "b")]
        return constrained_kl_ball_step(*given, **options)

    def value(self):
        return oracles.constrained_minimum(self.H, self.g.double(), self.delta, self.a, self.b)

    def extents(self, step):
        """|a_i| |s|, the scale of a constraint's rounding."""
        return self.a.double().norm(dim=1) * step.s.double().norm()

    def reaches(self):
        """How far each constraint's value can change in the ball."""
        a, inverse = self.a.double(), torch.linalg.inv(self.H)
        return (2 * self.delta * ((a @ inverse) * a).sum(dim=1).clamp(min=0)).sqrt()


KINDS = ["random", "like g", "against g", "like another", "against another", "zero"]


@st.composite
def problems(
    draw, max_m=4, kinds=tuple(KINDS), offsets=(-1.5, 1.2), max_log_condition=3, **options
):
    options = {"dtypes": [torch.float64], "max_n": 12, **options}
    system = draw(systems(max_log_condition=max_log_condition, **options))
    m = draw(st.integers(1, max_m))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    delta = 10 ** draw(st.floats(-4, 1))
    g = system.b.double()
    rows = []
    for _ in range(m):
        kind = draw(st.sampled_from(kinds))
        factor = 10 ** draw(st.floats(-3, 3))
        sign = -1.0 if kind.startswith("against") else 1.0
        row = torch.randn(len(g), generator=generator, dtype=torch.float64)
        if kind.endswith(" g"):
            row = sign * g
        elif kind.endswith("another") and rows:
            row = sign * rows[0]
        elif kind == "zero":
            row = torch.zeros_like(row)
        rows.append(factor * row)
    a = torch.stack(rows).to(system.b.dtype)
    inverse = torch.linalg.inv(system.exact)
    reach = (2 * delta * ((a.double() @ inverse) * a.double()).sum(dim=1)).clamp(min=0).sqrt()
    # a grid, so that two parallel constraints contradict each other by much or not at all
    low, high = (round(64 * offset) for offset in offsets)
    parts = [draw(st.one_of(st.just(0), st.integers(low, high))) / 64 for _ in range(m)]
    return Constrained(system, delta, a, reach * torch.tensor(parts, dtype=torch.float64))


F, e1, e2 = torch.eye(2, dtype=torch.float64), *torch.eye(2, dtype=torch.float64)
