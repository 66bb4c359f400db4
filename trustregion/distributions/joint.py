"""A prediction as the tuple of its independent factors, for one batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .family import Family, Metric, Tensors


@dataclass(frozen=True)
class Joint:
    """A prediction as the tuple of its independent factors, for one batch.

    Attributes:
        labels: the path of each factor in the prediction, its type and its transforms.
        families: the closed forms of each factor.
        parameters: the parameter tensors of each factor.
        constants: the constants of the transforms of each factor, in float64.
        batch_size: the size of the first dimension of the batch.
        weights: the weights in float64, with the shape of one or more leading batch dimensions;
            None for equal weights over the first dimension.
        total: the sum of the weights, by which a sum over the batch is divided to give a mean; the
            batch size without weights.

    """

    labels: tuple[str, ...]
    families: tuple[Family, ...]
    parameters: tuple[Tensors, ...]
    constants: tuple[Tensors, ...]
    batch_size: int
    weights: Tensor | None
    total: float

    def frozen(self) -> Joint:
        """Return a copy with detached float64 parameters, independent of later writes."""
        params = tuple(
            tuple(t.detach().to(torch.float64, copy=True) for t in tensors)
            for tensors in self.parameters
        )
        return replace(self, parameters=params)

    def mean_kl(self, new: Joint) -> Tensor:
        """Return KL(self || new): joint over factors and dimensions, mean over the batch."""
        total = torch.zeros((), dtype=torch.float64, device=self.parameters[0][0].device)
        for kl in self._kls(new):
            total = total + self._summed(kl)
        return total / self.total

    def largest_kl(self, new: Joint) -> Tensor:
        """Return the largest KL(self || new) of a sample with a positive weight."""
        rows = self.batch_size if self.weights is None else int((self.weights > 0).sum())
        return torch.stack([kl.reshape(rows, -1).sum(1) for kl in self._kls(new)]).sum(0).max()

    def _kls(self, new: Joint) -> Iterator[Tensor]:
        """Yield the KL of each factor in float64, samples first."""
        self._check_alike(new)
        for family, old_params, new_params in zip(
            self.families, self.parameters, new.parameters, strict=True
        ):
            old64 = tuple(self._counted(t).to(torch.float64) for t in old_params)
            new64 = tuple(self._counted(t).to(torch.float64) for t in new_params)
            yield family.kl(old64, new64)

    def flat_parameters(self) -> Tensors:
        """Return the parameter tensors of all factors."""
        return tuple(t for tensors in self.parameters for t in tensors)

    def fisher(self) -> Metric:
        """Return ``d -> M d`` over :meth:`flat_parameters`, summed over the batch.

        The sum is weighted; samples of weight 0 have rows of exact zeros.
        """
        detached = [tuple(self._counted(t.detach()) for t in p) for p in self.parameters]
        maps = [family.fisher(t) for family, t in zip(self.families, detached, strict=True)]
        sizes = [len(tensors) for tensors in self.parameters]

        def apply(d: Tensors) -> Tensors:
            out: list[Tensor] = []
            start = 0
            for factor, size in zip(maps, sizes, strict=True):
                part = d[start : start + size]
                out += self._spread(factor(tuple(self._counted(t) for t in part)), part)
                start += size
            return tuple(out)

        return apply

    def _counted(self, t: Tensor) -> Tensor:
        """Return the samples of positive weight, with the weighted dimensions flattened to one."""
        # They are selected, since zero times an infinity in the padding would be NaN.
        return t if self.weights is None else t[self.weights > 0]

    def _summed(self, kl: Tensor) -> Tensor:
        if self.weights is None:
            return kl.sum()
        weights = self.weights[self.weights > 0]
        return weights @ kl.reshape(len(weights), -1).sum(1)

    def _spread(self, counted: Iterable[Tensor], like: Tensors) -> Iterable[Tensor]:
        """Return the tensors times the weights, with zeros for the samples of weight 0."""
        if self.weights is None:
            return counted
        mask = self.weights > 0
        weights = self.weights[mask]
        out = []
        for part, t in zip(counted, like, strict=True):
            full = torch.zeros_like(t)
            full[mask] = weights.to(t.dtype).view(-1, *[1] * (part.ndim - 1)) * part
            out.append(full)
        return out

    def _check_alike(self, new: Joint) -> None:
        def structure(joint: Joint) -> object:
            shapes = [[t.shape for t in tensors] for tensors in joint.parameters]
            return joint.labels, joint.batch_size, shapes

        if structure(self) != structure(new):
            raise ValueError(
                "the two predictions differ in structure:"
                f" {_describe(self)} against {_describe(new)}. A KL needs the same distributions"
                " over the same batch: keep the batch fixed within a step"
            )
        for label, ours, theirs in zip(self.labels, self.constants, new.constants, strict=True):
            if not all(map(torch.equal, ours, theirs)):
                raise ValueError(
                    f"the two predictions differ in the constants of the transforms of {label},"
                    " which must be the same for a KL: let the base distribution depend on the"
                    " model instead"
                )
        if self.weights is None and new.weights is None:
            return
        if self.weights is None or new.weights is None:
            raise ValueError(
                "one of the two predictions is Weighted and the other is not: a KL needs the same"
                " weights on both"
            )
        if not torch.equal(self.weights, new.weights):
            raise ValueError(
                "the two predictions differ in their weights: a KL needs the same ones on both,"
                " so keep them fixed within a step"
            )


def _describe(joint: Joint) -> str:
    parts = (
        f"{label} {[tuple(t.shape) for t in tensors]}"
        for label, tensors in zip(joint.labels, joint.parameters, strict=True)
    )
    return f"({', '.join(parts)})"
