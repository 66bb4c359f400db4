"""The linear systems that every solver gets, each in float32 and in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution
from torch.nn.functional import cross_entropy, pad

import trustregion
from benchmarks.problem import ACTIONS, BATCH, HIDDEN, OBSERVATIONS, make_problem


@dataclass(frozen=True)
class System:
    """A symmetric positive definite system ``A x = b`` of shape ``(n,)``."""

    name: str
    b: Tensor
    product: Callable[[Tensor], Tensor]
    """``A v`` in the dtype of ``b``."""
    exact: Callable[[Tensor], Tensor]
    """``A V`` in float64 for columns ``V``, of the same data."""
    most: int = 600
    """Limit on products, if ``10 n`` is not less."""

    @property
    def limit(self) -> int:
        """On the products that a solver may take."""
        return min(10 * self.b.numel(), self.most)

    def residuals(self, X: Tensor) -> Tensor:
        """Return ``|b - A x| / |b|`` for the columns ``x``, in float64."""
        b = self.b.double().unsqueeze(1)
        return (b - self.exact(X.double())).norm(dim=0) / b.norm()


# Float64 needs up to 437 for a residual of 1e-10 where the condition is not extreme.
_HARD = {1e6: 3000}

Maker: TypeAlias = Callable[[torch.dtype], System]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator(), dtype=torch.float64)


def _stored(
    name: str, matrix: Tensor, b: Tensor, dtype: torch.dtype, most: int = System.most
) -> System:
    matrix = matrix.to(dtype)
    wide = matrix.double()
    return System(name, b.to(dtype), lambda v: matrix @ v, lambda V: wide @ V, most)


def _spectrum(n: int, condition: float) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, log-uniform from ``1 / condition`` to 1 and shuffled, and signs."""
    generator = _generator()
    d = torch.logspace(-math.log10(condition), 0, n, dtype=torch.float64)
    signs = 2.0 * torch.randint(0, 2, (n,), generator=generator) - 1
    return d[torch.randperm(n, generator=generator)], signs.double()


def dense(n: int, condition: float, dtype: torch.dtype) -> System:
    """A full matrix ``S Q' diag(d) Q S``, with the cosine transform ``Q`` and random signs ``S``.

    It is a Toeplitz and a Hankel part, and so made in ``n^2`` operations.
    """
    d, signs = _spectrum(n, condition)
    weights = d / n
    weights[0] /= 2  # the first cosine is the constant one
    waves = torch.fft.fft(pad(weights, (0, n))).real
    i = torch.arange(n)
    matrix = waves[(i - i.unsqueeze(1)).abs()] + waves[i + i.unsqueeze(1) + 1]
    matrix.mul_(signs).mul_(signs.unsqueeze(1))
    return _stored(
        f"dense {n}, {_power(condition)}",
        matrix,
        _normal(n),
        dtype,
        _HARD.get(condition, System.most),
    )


def factored(n: int, condition: float, dtype: torch.dtype) -> System:
    """The same kind of matrix, applied by its factors: fast transforms in place of ``n^2``."""
    d, signs = (t.to(dtype) for t in _spectrum(n, condition))
    d *= 4.0
    d[0] /= 2  # as in `dense`; the transforms of length 2 n divide by 2 n
    turn = torch.arange(n, dtype=torch.float64) * (math.pi / (2 * n))
    wave = torch.polar(torch.ones_like(turn), -turn)

    def multiply(d: Tensor, signs: Tensor, wave: Tensor, v: Tensor) -> Tensor:
        y = d * (torch.fft.fft(signs * v, 2 * n)[..., :n] * wave).real
        return signs * torch.fft.ifft(y * wave.conj(), 2 * n)[..., :n].real

    narrow = wave.to(torch.complex64 if dtype == torch.float32 else torch.complex128)
    return System(
        f"dense {n}, {_power(condition)}",
        _normal(n).to(dtype),
        lambda v: multiply(d, signs, narrow, v),
        lambda V: multiply(d.double(), signs.double(), wave, V.T).T,
        _HARD.get(condition, System.most),
    )


def _power(x: float) -> str:
    return f"1e{round(math.log10(x))}"


def kernel(n: int, noise: float, dtype: torch.dtype) -> System:
    """Kernel regression: a Gaussian kernel of length 0.2 on the unit square, and noise."""
    points = torch.rand(n, 2, generator=_generator(), dtype=torch.float64)
    matrix = torch.exp(-torch.cdist(points, points).square() / (2 * 0.2**2))
    matrix.diagonal().add_(noise)
    target = torch.sin(6 * points).sum(1) + math.sqrt(noise) * _normal(n)
    return _stored(f"kernel {n}, noise {noise:g}", matrix, target, dtype)


def _laplacian(side: int, V: Tensor) -> Tensor:
    u = V.reshape(side, side, -1)
    out = 4 * u
    out[1:] -= u[:-1]
    out[:-1] -= u[1:]
    out[:, 1:] -= u[:, :-1]
    out[:, :-1] -= u[:, 1:]
    return out.reshape(V.shape)


def poisson(side: int, dtype: torch.dtype) -> System:
    """The five-point Laplacian on a square grid with zero boundary, without a matrix."""
    product = partial(_laplacian, side)
    return System(f"poisson {side}x{side}", _normal(side**2).to(dtype), product, product)


@dataclass(frozen=True)
class _Model:
    net: nn.Module
    inputs: Tensor
    predict: Callable[[nn.Module, Tensor], Distribution]
    loss: Callable[[Distribution], Tensor]


def _categorical(net: nn.Module, inputs: Tensor) -> Distribution:
    return Categorical(logits=net(inputs))


def _tanh_net(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN),
        nn.Tanh(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.Tanh(),
        nn.Linear(HIDDEN, outputs),
    )


def _gaussian_policy() -> _Model:
    problem = make_problem()

    def loss(distribution: Distribution) -> Tensor:
        ratio = (distribution.log_prob(problem.actions) - problem.old_log_prob).exp()
        return -(ratio * problem.advantages).mean()

    return _Model(problem.policy, problem.observations, lambda net, x: net(x), loss)


def _categorical_policy() -> _Model:
    net, observations = _tanh_net(OBSERVATIONS, ACTIONS), torch.randn(BATCH, OBSERVATIONS)
    with torch.no_grad():
        actions = _categorical(net, observations).sample()
    advantages = (actions == observations[:, :ACTIONS].argmax(1)) + torch.randn(BATCH)

    def loss(distribution: Distribution) -> Tensor:
        return -(distribution.log_prob(actions).exp() * advantages).mean()

    return _Model(net, observations, _categorical, loss)


def _digits() -> _Model:
    images, labels = load_digits(return_X_y=True)
    inputs, target = torch.tensor(images).float() / 16, torch.tensor(labels)

    def loss(distribution: Distribution) -> Tensor:
        assert isinstance(distribution, Categorical)
        return cross_entropy(distribution.logits, target)

    return _Model(_tanh_net(inputs.shape[1], 10), inputs, _categorical, loss)


def fisher(
    name: str, make: Callable[[], _Model], damping: float, dtype: torch.dtype, steps: int = 20
) -> System:
    """The damped Fisher matrix of a net a few steps of Adam in; ``b`` is the gradient there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        adam = torch.optim.Adam(model.net.parameters(), lr=1e-3)
        for _ in range(steps):
            adam.zero_grad()
            model.loss(model.predict(model.net, model.inputs)).backward()
            adam.step()
    model.net.zero_grad()
    wide = _damped(model, damping, torch.float64)[0]
    A, b = _damped(model, damping, dtype)
    return System(f"{name} Fisher, {damping:g}", b, A.mv, wide.mm)


def _damped(
    model: _Model, damping: float, dtype: torch.dtype
) -> tuple[trustregion.LinearOperator, Tensor]:
    net = copy.deepcopy(model.net).to(dtype)
    params = list(net.parameters())
    distribution = model.predict(net, model.inputs.to(dtype))
    F = trustregion.FisherOperator(distribution, params)
    gradient = torch.autograd.grad(model.loss(distribution), params, retain_graph=True)
    b = torch.cat([g.reshape(-1) for g in gradient])
    return F + damping * trustregion.Identity(b.numel(), dtype), b


NETS = {
    "gaussian": _gaussian_policy,
    "categorical": _categorical_policy,
    "digits": _digits,
}

# 25 million stored numbers, some thousand times over, would take most of the report's time.
_BY_FACTORS = 5000

SYSTEMS: list[Maker] = [
    *(
        partial(factored if n == _BY_FACTORS else dense, n, condition)
        for n in (10, 100, 1000, 5000)
        for condition in (1e1, 1e3, 1e6)
    ),
    *(
        partial(fisher, name, net, damping)
        for name, net in NETS.items()
        for damping in (1e-1, 1e-3)
    ),
    *(partial(kernel, n, noise) for n, noise in ((1000, 1e-1), (2000, 1e-2))),
    *(partial(poisson, side) for side in (64, 128)),
]
