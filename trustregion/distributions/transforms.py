"""Invertible transforms without parameters, which leave the KL and the Fisher matrix unchanged."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import Transform

from .family import Tensors

# The invertible transforms, with their attributes that are numbers or tensors.
_INVERTIBLE: dict[type[Transform], tuple[str, ...]] = {
    td.AffineTransform: ("loc", "scale"),
    td.ExpTransform: (),
    td.PowerTransform: ("exponent",),
    td.ReshapeTransform: (),
    td.SigmoidTransform: (),
    td.SoftplusTransform: (),
    td.StickBreakingTransform: (),
    td.TanhTransform: (),
}


def constants_of(transform: Transform) -> tuple[tuple[str, ...], Tensors]:
    """Return the names of the parts of a transform, and the constants of all parts.

    Raises:
        TypeError: a part has parameters, or is not known to be invertible.

    """
    if isinstance(transform, td.ComposeTransform):
        parts = [constants_of(part) for part in transform.parts]
        return sum((n for n, _ in parts), ()), sum((c for _, c in parts), ())
    if type(transform) is td.IndependentTransform:
        return constants_of(transform.base_transform)
    if type(transform) in _INVERTIBLE:
        name, known = type(transform).__name__, transform
    elif type(transform.inv) in _INVERTIBLE:
        name, known = f"{type(transform.inv).__name__}.inv", transform.inv
    else:
        names = ", ".join(sorted(t.__name__ for t in _INVERTIBLE))
        raise TypeError(
            f"a distribution through {type(transform).__name__} is refused as a trust-region"
            " metric: it is not known to be one to one and without parameters, as these are:"
            f" {names}. MonteCarloFisherOperator and EmpiricalFisherOperator need no KL"
        )
    constants: list[Tensor] = []
    for attribute in _INVERTIBLE[type(known)]:
        value = getattr(known, attribute)
        if not isinstance(value, Tensor):
            value = torch.tensor(value, device="cpu")
        if value.requires_grad:
            raise TypeError(
                f"a distribution through {name} whose {attribute} requires a gradient is refused"
                " as a trust-region metric: parameters inside its transforms would be invisible to"
                " the KL. Let the base distribution have them, as in Normal(loc, scale), or"
                f" detach {attribute}"
            )
        constants.append(value.to(torch.float64, copy=True))
    return (name,), tuple(constants)
