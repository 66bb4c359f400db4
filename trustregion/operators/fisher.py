"""The Fisher matrix of a model's predictions as an operator, from the graph that made them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..autodiff import differentiate
from ..distributions import Joint, Prediction, joint_of
from ..vector import ParameterVector
from .base import LinearOperator
from .map import FunctionMap, LinearMap
from .root import FisherRoot


class FisherOperator(LinearOperator):
    r"""The Fisher matrix :math:`F = \frac1N \sum_i J_i' M_i J_i` of shape ``(n, n)``.

    :math:`J_i` is the Jacobian of the distribution's parameters for sample *i* in the model's
    parameters, and :math:`M_i` the Fisher matrix of the family there, in closed form. ``F`` is
    symmetric positive semi-definite by construction, and equals the Hessian of
    KL(old || new) at the current parameters.

    The graph of the prediction is differentiated once, into ``w -> J'w``. Each product then runs
    ``v -> Jv`` (a vector-Jacobian product of that map, which is linear in ``w``), ``M``, and
    ``J'``: four matrix products a dense layer, no forward pass. A KL double backward costs six.

    Parameters that are frozen or that the prediction does not use have rows of exact zeros.

    Args:
        distribution: the prediction, with its graph; a torch distribution, or a dict, list or
            tuple of independent ones. Its graph is kept alive by the operator.
        params: the parameters, in the order of the flat vector. An already built
            :class:`ParameterVector` is taken as it is.

    Raises:
        TypeError: a family that is unknown or refused, or parameters of a wrong type.
        ValueError: the prediction does not depend on the parameters.
        RuntimeError: a part of the model cannot be differentiated twice, or its graph was freed.

    Example:
        >>> from torch.distributions import Normal
        >>> mean = torch.zeros(3, requires_grad=True)
        >>> F = FisherOperator(Normal(mean, torch.tensor([1.0, 2.0, 4.0])), [mean])
        >>> 3 * (F @ torch.ones(3))
        tensor([1.0000, 0.2500, 0.0625])

    References:
        Schulman et al., Trust Region Policy Optimization, 2015, appendix C.1.

    """

    def __init__(
        self, distribution: Prediction | Joint, params: ParameterVector | Iterable[Tensor]
    ) -> None:
        vector = params if isinstance(params, ParameterVector) else ParameterVector(params)
        super().__init__(vector.numel, vector.dtype, vector.device)
        joint = distribution if isinstance(distribution, Joint) else joint_of(distribution)
        self._vector = vector
        self._outputs = joint.flat_parameters()
        self._active = [i for i, y in enumerate(self._outputs) if y.requires_grad]
        if not self._active:
            raise ValueError(
                "the distribution carries no graph: build it from the model's outputs with grad"
                " enabled, without detach(), .item() or torch.no_grad()"
            )
        self._joint, self.batch_size = joint, joint.batch_size
        self._metric = joint.fisher()
        self._linearise()

    def _linearise(self) -> None:
        """Record ``w -> J'w`` at ``w = 0``; its derivative in ``w`` along ``v`` is ``Jv``."""
        self._y = [self._outputs[i] for i in self._active]
        self._w = [torch.zeros_like(y, requires_grad=True) for y in self._y]
        trainable = [i for i, p in enumerate(self._vector.params) if p.requires_grad]
        if not trainable:
            raise ValueError("no parameter requires a gradient: all of them are frozen")
        inputs = [self._vector.params[i] for i in trainable]
        with torch.enable_grad():
            pullback = differentiate(self._y, inputs, self._w, create_graph=True)
        used = [
            (i, jt_w)
            for i, jt_w in zip(trainable, pullback, strict=True)
            if jt_w is not None and jt_w.requires_grad
        ]
        if not used:
            raise ValueError(
                "the distribution does not depend on the parameters: its graph leads to none of"
                f" the {len(self._vector.params)} given"
            )
        self.used = tuple(i for i, _ in used)  # positions of the parameters that F sees
        self._inputs = [self._vector.params[i] for i in self.used]
        self._pullback = [jt_w for _, jt_w in used]

    def jvp(self, v: Tensor) -> tuple[Tensor, ...]:
        """Return ``Jv``: the change of each parameter tensor of the distribution along ``v``."""
        parts = self._vector.unravel(v)
        tangents = differentiate(self._pullback, self._w, [parts[i] for i in self.used])
        slots: list[Tensor | None] = [None] * len(self._outputs)
        for i, tangent in zip(self._active, tangents, strict=True):
            slots[i] = tangent
        pairs = zip(slots, self._outputs, strict=True)
        return tuple(torch.zeros_like(y) if t is None else t for t, y in pairs)

    def vjp(self, u: Sequence[Tensor]) -> Tensor:
        """Return ``J'u`` of shape ``(n,)``."""
        grads = differentiate(self._y, self._inputs, [u[i] for i in self._active])
        return self._vector.ravel_at(self.used, grads)

    @torch.no_grad()
    def mv(self, v: Tensor) -> Tensor:
        """Return ``F v``. Cost: one product, no forward pass."""
        return self.vjp(self._metric(self.jvp(v))).div_(self.batch_size)

    @property
    def jacobian(self) -> LinearMap:
        """The Jacobian ``J`` of shape ``(m, n)``: of all parameters of the distribution, flattened.

        Its rows are the parameter tensors in the order of :meth:`jvp`, each in its logical order; a
        product with ``J`` or with ``J'`` costs half a product with ``F``.

        Example:
            >>> from torch.distributions import Normal
            >>> mean = torch.zeros(2, requires_grad=True)
            >>> F = FisherOperator(Normal(mean, torch.tensor([1.0, 2.0])), [mean])
            >>> F.jacobian.shape, F.jacobian.mv(torch.tensor([3.0, 4.0]))
            ((4, 2), tensor([3., 4., 0., 0.]))

        """
        shape = (sum(y.numel() for y in self._outputs), self._vector.numel)
        return FunctionMap(
            lambda v: self._flatten(self.jvp(v)),
            lambda u: self.vjp(self._unflatten(u)),
            shape,
            self.dtype,
            self.device,
        )

    @torch.no_grad()
    def metric(self, u: Tensor) -> Tensor:
        """Return ``M u`` of shape ``(m,)``: the Fisher matrix of the family, sample by sample.

        With it, ``F v`` is ``jacobian.rmv(metric(jacobian.mv(v))) / batch_size``.
        """
        return self._flatten(self._metric(self._unflatten(u)))

    @torch.no_grad()
    def root(self) -> FisherRoot:
        r"""Return ``R`` of shape ``(m, n)`` with :math:`R'R = F`, a map for least squares.

        ``lsqr(F.root(), y, damping=d)`` solves :math:`(F + d I) x = R'y`, and
        :meth:`FisherRoot.lift` gives the ``y`` with :math:`R'y = g` for the gradient ``g`` of a
        loss. It needs no more iterations than :func:`cg`. In float32, measured on linear models at
        conditions of ``F`` from 1e2 to 1e6 with a damping of 1e-6 of its largest eigenvalue, its
        error is 5 to 1e5 times smaller where ``R x`` comes near ``y``. For a ``y`` mostly out of
        reach, as the gradient of noisy labels gives, the problem itself is as sensitive as the
        condition of ``F``: the error is 1000 times smaller to 200 times larger, smaller for sure at
        an ``F`` of deficient rank and moderate condition only.

        With ``C`` outputs a sample, the cost is ``C + 1`` products with the metric, none with the
        network, and the eigenvectors of N matrices ``(C, C)`` in float64; the memory is N C^2. That
        is for few outputs a sample: ``C`` counts all factors, and ``d + d^2`` for a
        ``MultivariateNormal``.

        Raises:
            ValueError: the family is not one with parameters for each sample; see
                :class:`FisherRoot`.

        Example:
            >>> from torch.distributions import Categorical
            >>> W, v = torch.zeros(2, 3, requires_grad=True), torch.tensor([3.0, 0, 0, 0, 6, 0])
            >>> F = FisherOperator(Categorical(logits=torch.eye(2) @ W), [W])
            >>> R = F.root()
            >>> R.shape, torch.allclose(R.rmv(R.mv(v)), F @ v)
            ((6, 6), True)

        """
        return FisherRoot(self.jacobian, self._joint)

    def _flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.reshape(-1) for t in tensors]).to(self.dtype)

    def _unflatten(self, u: Tensor) -> tuple[Tensor, ...]:
        parts = u.split([y.numel() for y in self._outputs])
        pairs = zip(parts, self._outputs, strict=True)
        return tuple(part.view(y.shape) for part, y in pairs)
