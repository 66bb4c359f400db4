"""Checks of a closure's derivatives against its values."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..operators.fisher import FisherOperator
from ..optim.derivatives import gradient_of
from ..vector import dot, norm
from .report import ClosureCheck
from .slopes import Curve, Verdict, judge
from .subject import Subject

_COUNT = 13  # The number of step lengths, from half the root of the rounding unit to one half.
_DIRECTIONS = 8  # The number of directions tried before a derivative counts as wrong.
_LOOK_IN_FAMILY = "correct the fisher of a registered Family, or the backward of a Function."


class Derivatives:
    """The checks of the gradients and the Fisher matrix along random directions.

    Args:
        subject: The closure.
        F: The Fisher matrix of its prediction.
        seed: The seed of the directions.

    """

    def __init__(self, subject: Subject, F: FisherOperator, seed: int) -> None:
        self._subject, self._F = subject, F
        self._random = torch.Generator().manual_seed(seed)

    def checks(self) -> Iterator[ClosureCheck]:
        """Yield the checks in order."""
        subject = self._subject
        with torch.autocast(subject.vector.device.type, enabled=False):
            # All products come first: writing other parameters invalidates the graph.
            G = torch.stack([*self._gradients()]).double()
            us = [self._normal() for _ in range(_DIRECTIONS)]
            directions = [(u, self._F.mv(u)) for u in us]
            g = G[0].to(subject.theta)
            along = self._scaled(g, self._F.mv(g))
        yield from self._semidefinite(*directions[:2])
        verdicts = self._orders(directions[0], along, G)
        for direction in directions[1:]:
            # A wrong derivative fails in all directions, a nearby kink only in some.
            if all(verdict.passed is not False for verdict in verdicts.values()):
                break
            for name, verdict in self._orders(direction, along, G).items():
                if verdicts[name].passed is False and verdict.passed:
                    verdicts[name] = verdict
        kl = verdicts.pop("KL")
        for name, verdict in verdicts.items():
            yield _first_order(verdict, name)
        yield _second_order(kl)

    def _gradients(self) -> Iterator[Tensor]:
        subject = self._subject
        for value in subject.scalars.values():
            depends = value.requires_grad  # A constraint may be constant.
            yield gradient_of(value, subject.vector) if depends else torch.zeros_like(subject.theta)

    def _normal(self) -> Tensor:
        theta = self._subject.theta
        return torch.randn(len(theta), generator=self._random, dtype=torch.float64).to(theta)

    def _semidefinite(
        self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
    ) -> Iterator[ClosureCheck]:
        (u, Fu), (v, Fv) = first, second
        size = max(norm(u) * norm(Fv), norm(v) * norm(Fu), torch.finfo(torch.float64).tiny)
        tolerance = math.sqrt(self._subject.unit)  # Well above rounding and well below 1.
        gap = abs(dot(u, Fv) - dot(v, Fu)) / size
        yield ClosureCheck(
            "the Fisher matrix is symmetric", gap <= tolerance, gap, f"difference {gap:.1e}",
            f"u'Fv and v'Fu differ by more than rounding (relative to |u||Fv|): {_LOOK_IN_FAMILY}",
        )  # fmt: skip
        least = min(dot(u, Fu), dot(v, Fv)) / size
        yield ClosureCheck(
            "the Fisher matrix is semidefinite", least >= -tolerance, least, f"least {least:.1e}",
            f"u'Fu is negative (relative to |u||Fu|): {_LOOK_IN_FAMILY}",
        )  # fmt: skip

    def _scaled(self, u: Tensor, Fu: Tensor) -> tuple[Tensor, Tensor]:
        """Scale ``u`` and ``Fu`` to a length at which the KL is about 1/2, in float64."""
        square, size = abs(dot(u, Fu)), norm(u)
        if 0 < square < math.inf:
            scale = square**-0.5
        else:
            scale = (norm(self._subject.theta) or 1.0) / size if size else 0.0
        return scale * u.double(), scale * Fu.double()

    def _orders(
        self, direction: tuple[Tensor, Tensor], along: tuple[Tensor, Tensor], G: Tensor
    ) -> dict[str, Verdict]:
        """Judge the models of the values and of the KL along a random direction plus the gradient.

        The random direction shows every mistake, and along the gradient the loss changes enough to
        be well above rounding.
        """
        subject, unit = self._subject, self._subject.unit
        d, Fd = (a + b for a, b in zip(self._scaled(*direction), along, strict=True))
        ratio = unit ** (0.5 / (_COUNT - 1))
        lengths = [0.5 * ratio**k for k in reversed(range(_COUNT))]
        # Steps that change only a few bits measure the rounding of the closure.
        tiny = unit * max(1.0, norm(subject.theta) / norm(d))
        noise = torch.stack([self._error(i * tiny, d, Fd, G)[0] for i in (2, 4, 6, 8)]).amax(0)
        noise[:-1] += unit * subject.here.abs()
        pairs = [self._error(t, d, Fd, G) for t in lengths]
        errors, said = (torch.stack(column) for column in zip(*pairs, strict=True))
        floors = noise + 16 * unit * said  # The second term is the rounding of the derivatives.
        # Rounding moves the prediction by a KL of about b, and the step by t^2 d'Fd / 2. The KL of
        # both together also holds a cross term, the root of their product.
        cross = math.sqrt(2 * noise[-1].item() * abs(dot(d, Fd)))
        floors[:, -1] += cross * torch.tensor(lengths).to(floors)
        verdicts = {}
        for i, name in enumerate([*subject.scalars, "KL"]):
            curve = Curve(
                lengths, errors[:, i].tolist(), floors[:, i].tolist(), said[:, i].tolist()
            )
            verdicts[name] = judge(curve, 3 if name == "KL" else 2, unit)
        return verdicts

    def _error(self, t: float, d: Tensor, Fd: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
        """Return the errors of the models of the values and the KL, and the models' own values.

        Each is the larger one of those at ``theta + t d`` and ``theta - t d``.
        """
        theta, errors, said = self._subject.theta, [], []
        for step in (t, -t):
            new = (theta.double() + step * d).to(theta.dtype)
            s = new.double() - theta.double()  # The step after rounding.
            # This is s'Fs / 2 up to the square of the rounding, from the one product F d.
            half = step * (s @ Fd) - step * step / 2 * (d @ Fd)
            model = torch.cat([G @ s, half.reshape(1)])
            errors.append((self._subject.changes(new) - model).abs())
            said.append(model.abs())
        return torch.stack(errors).amax(0), torch.stack(said).amax(0)


def _first_order(verdict: Verdict, name: str) -> ClosureCheck:
    return ClosureCheck(
        f"the gradient of {'the ' * (name == 'loss')}{name}",
        verdict.passed, verdict.value, verdict.words,
        "|f(theta + t d) - f(theta) - t g'd| should fall as t^2 does. "
        + (
            "Look for a detached part, for a mistake in the backward of a custom"
            " torch.autograd.Function, and for a kink or a jump at these parameters; float64"
            " distinguishes a nearby kink from a mistake."
            if verdict.passed is False
            else _UNKNOWN
        ),
    )  # fmt: skip


def _second_order(verdict: Verdict) -> ClosureCheck:
    return ClosureCheck(
        "the Fisher matrix is the KL's", verdict.passed, verdict.value, verdict.words,
        "|KL(theta, theta + t d) - t^2 d'Fd / 2| should fall as t^3 does. "
        + (
            "Look for a mistake in the kl or the fisher of a registered Family, for a detached part"
            " of the distribution, and for a mistake in the backward of a custom"
            " torch.autograd.Function; float64 distinguishes a nearby kink from a mistake."
            if verdict.passed is False
            else _UNKNOWN
        ),
    )  # fmt: skip


_UNKNOWN = (
    "Too few steps have an error well above rounding: repeat the check with the model and its data"
    " in float64, without autocast."
)
