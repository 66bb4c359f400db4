r"""What a trust region needs of a distribution family: its parameters, its KL, its Fisher.

For a family :math:`p(y | \phi)` with parameter tensors :math:`\phi` (the network's outputs), the
KL of a small change is :math:`\mathrm{KL}(\phi \| \phi + d) = \frac12 d' M(\phi) d + O(d^3)` with
:math:`M` the Fisher information of the family. A :class:`Family` holds both in closed form. Where
the Hessian of a KL is *not* the Fisher, or the KL does not exist, the family is refused by name.

KLs are evaluated in float64 from the parameter tensors, in forms without cancellation: in float32
a KL of 1e-8 is wrong by 10 to 50 % and can be negative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution
from torch.nn.functional import log_softmax, logsigmoid

Tensors: TypeAlias = tuple[Tensor, ...]
Prediction: TypeAlias = "Distribution | Mapping[str, Prediction] | Sequence[Prediction]"


@dataclass(frozen=True)
class Family:
    """A distribution family in closed form.

    Attributes:
        parameters: distribution -> its parameter tensors, still attached to the graph.
        kl: ``(old, new)`` parameter tensors -> KL(old || new), one value per element of the batch
            shape. Called with float64 tensors.
        fisher: parameter tensors -> the map ``d -> M d`` from a change of the parameter tensors to
            a tuple of the same shapes. What does not depend on ``d`` is computed once.

    """

    parameters: Callable[..., Tensors]
    kl: Callable[[Tensors, Tensors], Tensor]
    fisher: Callable[[Tensors], Callable[[Tensors], Tensors]]


def _normal_kl(old: Tensors, new: Tensors) -> Tensor:
    (mu0, s0), (mu1, s1) = old, new
    # t = s0^2/s1^2 - 1 without cancellation; KL = (t - log(1 + t) + z^2) / 2
    t = (s0 - s1) * (s0 + s1) / s1.square()
    kl = 0.5 * (t - torch.log1p(t) + ((mu0 - mu1) / s1).square())
    return torch.where((s0 > 0) & (s1 > 0), kl, torch.inf)  # squares do not see the sign


def _normal_fisher(params: Tensors) -> Callable[[Tensors], Tensors]:
    precision = params[1].square().reciprocal()
    twice = 2 * precision
    return lambda d: (precision * d[0], twice * d[1])


def _categorical_kl(old: Tensors, new: Tensors) -> Tensor:
    # Normalised anew: float32 logits are normalised to 1e-7 only, which a KL of 1e-8 would show.
    log_p, log_q = log_softmax(old[0], -1), log_softmax(new[0], -1)
    p = log_p.exp()
    return _expected_difference(p, log_p, log_q).sum(-1)


def _expected_difference(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return p (log p - log q): 0 for p = 0, a masked action; inf for p > 0 = q."""
    possible = p > 0  # masked inside, where a derivative would see inf - inf
    return p * (torch.where(possible, log_p, 0.0) - torch.where(possible, log_q, 0.0))


def _categorical_fisher(params: Tensors) -> Callable[[Tensors], Tensors]:
    p = torch.softmax(params[0], -1)

    def fisher(d: Tensors) -> Tensors:
        pd = p * d[0]
        return (pd.addcmul_(p, pd.sum(-1, keepdim=True), value=-1),)

    return fisher


def _bernoulli_kl(old: Tensors, new: Tensors) -> Tensor:
    def half(sign: int) -> Tensor:
        log_p, log_q = logsigmoid(sign * old[0]), logsigmoid(sign * new[0])
        return _expected_difference(log_p.exp(), log_p, log_q)

    return half(1) + half(-1)


def _bernoulli_fisher(params: Tensors) -> Callable[[Tensors], Tensors]:
    variance = torch.sigmoid(params[0]) * torch.sigmoid(-params[0])
    return lambda d: (variance * d[0],)


def _mvn_kl(old: Tensors, new: Tensors) -> Tensor:
    (mu0, l0), (mu1, l1) = old, new
    a = torch.linalg.solve_triangular(l1, l0, upper=False)
    z = torch.linalg.solve_triangular(l1, (mu0 - mu1).unsqueeze(-1), upper=False)
    d0, d1 = l0.diagonal(dim1=-2, dim2=-1), l1.diagonal(dim1=-2, dim2=-1)
    # As for Normal on the diagonal of L1^-1 L0; below it, squares only.
    t = (d0 - d1) * (d0 + d1) / d1.square()
    below = a.tril(-1).square().sum((-2, -1))
    kl = 0.5 * ((t - torch.log1p(t)).sum(-1) + below + z.square().sum((-2, -1)))
    return torch.where(((d0 > 0) & (d1 > 0)).all(-1), kl, torch.inf)


def _mvn_fisher(params: Tensors) -> Callable[[Tensors], Tensors]:
    scale_tril = params[1]
    inverse = torch.linalg.solve_triangular(
        scale_tril, torch.eye(scale_tril.shape[-1]).to(scale_tril), upper=False
    )
    inverse_t = inverse.mT

    def fisher(d: Tensors) -> Tensors:
        mean = inverse_t @ (inverse @ d[0].unsqueeze(-1))
        # With A = L^-1 dL the metric is |A + A'|^2 / 2, hence M dL = tril(L^-T (A + A')).
        a = inverse @ d[1].tril()
        return mean.squeeze(-1), (inverse_t @ (a + a.mT)).tril()

    return fisher


_FAMILIES: dict[type[Distribution], Family] = {
    td.Categorical: Family(lambda d: (d.logits,), _categorical_kl, _categorical_fisher),
    td.Normal: Family(lambda d: (d.loc, d.scale), _normal_kl, _normal_fisher),
    td.Bernoulli: Family(lambda d: (d.logits,), _bernoulli_kl, _bernoulli_fisher),
    td.MultivariateNormal: Family(lambda d: (d.loc, d.scale_tril), _mvn_kl, _mvn_fisher),
}

_KINK = (
    "its KL has a kink or a different curvature at equal parameters, so the Hessian of the KL is"
    " not the Fisher matrix"
)
_SUPPORT = "its support moves with its parameters, so the Fisher matrix does not exist"
_NO_KL = "its KL has no closed form"
_REFUSED: dict[type[Distribution], str] = {
    td.Laplace: _KINK,
    td.Weibull: _KINK,
    td.Kumaraswamy: _KINK,
    td.Uniform: _SUPPORT,
    td.Pareto: _SUPPORT,
    td.TransformedDistribution: "parameters inside its transforms would be invisible to the KL",
    td.MixtureSameFamily: _NO_KL,
    td.StudentT: _NO_KL,
}


def register_distribution(
    cls: type[Distribution],
    family: Family | None = None,
    *,
    like: type[Distribution] | None = None,
) -> None:
    """Teach the package a distribution family, or that a subclass behaves like a known one.

    Families are looked up by exact type, because a subclass may change ``log_prob`` and with it
    the KL and the Fisher. A registration overrides an earlier one and the list of refusals.

    Args:
        cls: the distribution class.
        family: its closed forms.
        like: instead of ``family``, a known class with the same parameters, KL and Fisher.

    Raises:
        TypeError: ``cls`` is not a class of distributions, ``family`` is not a :class:`Family`.
        ValueError: both or neither of ``family`` and ``like``, or ``like`` is unknown.

    Example:
        >>> class Policy(td.Categorical):
        ...     "A Categorical with a method of its own."
        >>> register_distribution(Policy, like=td.Categorical)
        >>> print(mean_kl(Policy(logits=torch.zeros(3, 2)), Policy(logits=torch.zeros(3, 2))))
        tensor(0., dtype=torch.float64)

    """
    if not (isinstance(cls, type) and issubclass(cls, Distribution)):
        raise TypeError(f"cls must be a subclass of torch.distributions.Distribution, got {cls!r}")
    if (family is None) == (like is None):
        raise ValueError("give exactly one of family= and like=")
    if like is not None:
        if like not in _FAMILIES:
            known = ", ".join(sorted(c.__name__ for c in _FAMILIES))
            raise ValueError(f"like={like.__name__} is not a registered family; known: {known}")
        family = _FAMILIES[like]
    if not isinstance(family, Family):
        raise TypeError(f"family must be a trustregion.Family, got {type(family).__name__}")
    _FAMILIES[cls] = family


def _family_of(distribution: Distribution) -> tuple[Family, Distribution]:
    """Return the family of a distribution and the distribution that holds its parameters."""
    cls = type(distribution)
    if cls in _FAMILIES:
        return _FAMILIES[cls], distribution
    if isinstance(
        distribution, td.Independent
    ):  # a KL and a Fisher sum over its event dimensions, as they do anyway
        return _family_of(distribution.base_dist)
    for refused, reason in _REFUSED.items():
        if isinstance(distribution, refused):
            raise TypeError(
                f"{cls.__name__} is refused as a trust-region metric: {reason}. Use another"
                f" family, or register_distribution({cls.__name__}, Family(...)) with a KL and"
                " a Fisher that you know to agree"
            )
    subclass_of = next((c.__name__ for c in _FAMILIES if isinstance(distribution, c)), None)
    hint = f", or register_distribution({cls.__name__}, like={subclass_of})" if subclass_of else ""
    raise TypeError(
        f"{cls.__name__} has no registered KL and Fisher. Register them with"
        f" register_distribution({cls.__name__}, Family(parameters, kl, fisher)){hint}"
    )


def _leaves(prediction: Prediction, path: str = "") -> Iterator[tuple[str, Distribution]]:
    if isinstance(prediction, Distribution):
        yield path, prediction
    elif isinstance(prediction, Mapping):
        for key in prediction:
            yield from _leaves(prediction[key], f"{path}[{key!r}]")
    elif isinstance(prediction, (list, tuple)):
        for i, part in enumerate(prediction):
            yield from _leaves(part, f"{path}[{i}]")
    else:
        given = "a tensor" if isinstance(prediction, Tensor) else f"{type(prediction).__name__}"
        raise TypeError(
            "a prediction must be a torch distribution, or a dict, list or tuple of independent"
            f" ones, got {given}{' at ' + path if path else ''}: wrap network outputs, for example"
            " Categorical(logits=outputs)"
        )


@dataclass(frozen=True)
class Joint:
    """A prediction as the tuple of its independent factors, for one batch.

    Attributes:
        labels: where each factor stands in the prediction, and its type.
        families: the closed forms of each factor.
        parameters: the parameter tensors of each factor.
        batch_size: the number of samples the KL and the Fisher are averaged over.

    """

    labels: tuple[str, ...]
    families: tuple[Family, ...]
    parameters: tuple[Tensors, ...]
    batch_size: int

    def frozen(self) -> Joint:
        """Return a copy with detached float64 parameters, which later writes cannot change."""
        params = tuple(
            tuple(t.detach().to(torch.float64, copy=True) for t in tensors)
            for tensors in self.parameters
        )
        return Joint(self.labels, self.families, params, self.batch_size)

    def mean_kl(self, new: Joint) -> Tensor:
        """KL(self || new), joint over factors and dimensions, mean over the batch, in float64."""
        shapes = [[t.shape for t in tensors] for tensors in self.parameters]
        new_shapes = [[t.shape for t in tensors] for tensors in new.parameters]
        if (self.labels, self.batch_size, shapes) != (new.labels, new.batch_size, new_shapes):
            raise ValueError(
                "the two predictions differ in structure:"
                f" {_describe(self)} against {_describe(new)}. The same distributions over the same"
                " batch are needed to measure a KL: keep the batch fixed within a step"
            )
        total = torch.zeros((), dtype=torch.float64, device=self.parameters[0][0].device)
        for family, old_params, new_params in zip(
            self.families, self.parameters, new.parameters, strict=True
        ):
            old64 = tuple(t.to(torch.float64) for t in old_params)
            new64 = tuple(t.to(torch.float64) for t in new_params)
            total = total + family.kl(old64, new64).sum()
        return total / self.batch_size

    def flat_parameters(self) -> Tensors:
        """All parameter tensors, factor by factor."""
        return tuple(t for tensors in self.parameters for t in tensors)

    def fisher(self) -> Callable[[Tensors], Tensors]:
        """Return ``d -> M d`` over :meth:`flat_parameters`, summed over the batch."""
        detached = [tuple(t.detach() for t in tensors) for tensors in self.parameters]
        maps = [family.fisher(t) for family, t in zip(self.families, detached, strict=True)]
        sizes = [len(tensors) for tensors in self.parameters]

        def apply(d: Tensors) -> Tensors:
            out: list[Tensor] = []
            start = 0
            for factor, size in zip(maps, sizes, strict=True):
                out += factor(d[start : start + size])
                start += size
            return tuple(out)

        return apply


def _describe(joint: Joint) -> str:
    parts = (
        f"{label} {[tuple(t.shape) for t in tensors]}"
        for label, tensors in zip(joint.labels, joint.parameters, strict=True)
    )
    return f"({', '.join(parts)})"


def joint_of(prediction: Prediction) -> Joint:
    """Resolve a prediction (a distribution, or a dict, list or tuple of them) to a :class:`Joint`.

    The first dimension of a distribution's batch shape is the batch; all others, the event
    dimensions of ``Independent`` and all factors are summed, since they are one joint event.

    Raises:
        TypeError: not a distribution, or a family that is unknown or refused.
        ValueError: an empty prediction or batch, or factors with different batch sizes.

    """
    leaves = list(_leaves(prediction))
    if not leaves:
        raise ValueError("the prediction is empty: it holds no distribution")
    labels, families, parameters = [], [], []
    sizes: dict[str, int] = {}
    for path, leaf in leaves:
        family, base = _family_of(leaf)
        labels.append(f"{path}{type(leaf).__name__}")
        sizes[labels[-1]] = leaf.batch_shape[0] if leaf.batch_shape else 1
        families.append(family)
        with torch.enable_grad():  # some parameters are computed on first access
            parameters.append(tuple(family.parameters(base)))
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the factors of a joint prediction must share one batch, got {sizes}")
    batch_size = next(iter(sizes.values()))
    if batch_size == 0 or any(t.numel() == 0 for tensors in parameters for t in tensors):
        raise ValueError("the prediction is over an empty batch: it holds no sample")
    return Joint(tuple(labels), tuple(families), tuple(parameters), batch_size)


def mean_kl(old: Prediction, new: Prediction) -> Tensor:
    """KL(old || new) in nats: joint over all dimensions, mean over the batch, in float64.

    Args:
        old: a distribution, or a dict, list or tuple of independent ones.
        new: the same structure over the same batch.

    Returns:
        A float64 scalar, differentiable in the parameters of both.

    Raises:
        TypeError: a family that is unknown or refused.
        ValueError: the predictions differ in structure or shape.

    Example:
        >>> old = td.Normal(torch.zeros(5), torch.ones(5))
        >>> new = td.Normal(torch.full((5,), 0.2), torch.ones(5))
        >>> round(mean_kl(old, new).item(), 6)
        0.02

    """
    return joint_of(old).mean_kl(joint_of(new))
