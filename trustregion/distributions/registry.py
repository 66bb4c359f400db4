"""The registry of families, by the exact type of a distribution."""

from __future__ import annotations

from typing import NamedTuple

from torch import distributions as td
from torch.distributions import Distribution

from .catalogue import FAMILIES, REFUSED
from .family import Family, Tensors
from .transforms import constants_of

_FAMILIES = dict(FAMILIES)


def register_distribution(
    cls: type[Distribution],
    family: Family | None = None,
    *,
    like: type[Distribution] | None = None,
) -> None:
    """Register a distribution family, or a subclass that behaves like a known family.

    Families are looked up by exact type, because a subclass may change ``log_prob`` and with it
    the KL and the Fisher matrix. A registration overrides earlier ones and refusals.

    Args:
        cls: the distribution class.
        family: the closed forms of the family.
        like: instead of ``family``, a known class with the same parameters, KL and Fisher matrix.

    Raises:
        TypeError: ``cls`` is not a class of distributions, or ``family`` is not a :class:`Family`.
        ValueError: both or neither of ``family`` and ``like`` are given, or ``like`` is unknown.

    Example:
        >>> import torch
        >>> from trustregion import mean_kl
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


class Factor(NamedTuple):
    """The name and the closed forms of a distribution, and the distribution with its parameters."""

    name: str
    family: Family
    holder: Distribution
    constants: Tensors  # the constants of its transforms


def resolve(distribution: Distribution) -> Factor:
    """Find the family of a distribution, through ``Independent`` and transforms.

    Raises:
        TypeError: the family is unknown or refused.

    """
    cls = type(distribution)
    if cls in _FAMILIES:
        return Factor(cls.__name__, _FAMILIES[cls], distribution, ())
    if isinstance(distribution, td.Independent):
        # the KL and the Fisher matrix are sums over all event dimensions in any case
        base = resolve(distribution.base_dist)
        return base._replace(name=f"{cls.__name__}({base.name})")
    if isinstance(distribution, td.TransformedDistribution) and cls is td.TransformedDistribution:
        names, constants = constants_of(td.ComposeTransform(distribution.transforms))
        base = resolve(distribution.base_dist)
        name = f"{cls.__name__}({', '.join((base.name, *names))})"
        return base._replace(name=name, constants=(*base.constants, *constants))
    for refused, reason in REFUSED.items():
        if isinstance(distribution, refused):
            raise TypeError(
                f"{cls.__name__} is refused as a trust-region metric: {reason}. Use another"
                f" family, or register_distribution({cls.__name__}, Family(...)) with a KL and"
                " a Fisher matrix that agree"
            )
    subclass_of = next((c.__name__ for c in _FAMILIES if isinstance(distribution, c)), None)
    hint = f", or register_distribution({cls.__name__}, like={subclass_of})" if subclass_of else ""
    raise TypeError(
        f"{cls.__name__} has no registered KL and Fisher. Register them with"
        f" register_distribution({cls.__name__}, Family(parameters, kl, fisher)){hint}"
    )
