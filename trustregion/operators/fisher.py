"""The Fisher matrix of a model's predictions, from their recorded graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from ..distributions import Joint, Prediction, joint_of
from ..linearise import Linearisation, linearise
from ..linearise.functional import FunctionalLinearisation, Run, from_function
from ..subsample import select
from ..vector import ParameterVector
from .gauss_newton import GaussNewtonOperator
from .root import FisherRoot


class FisherOperator(GaussNewtonOperator):
    r"""The Fisher matrix :math:`F = \frac1N \sum_i J_i' M_i J_i` of shape ``(n, n)``.

    :math:`J_i` is the Jacobian of the distribution's parameters for sample *i* in the model's
    parameters, and :math:`M_i` the Fisher matrix of the family at that sample, in closed form.
    ``F`` is symmetric positive semidefinite by construction, and equals the Hessian of
    KL(old || new) at the current parameters.

    A product applies ``J``, ``M`` and ``J'``, which are linearized once from the graph of the
    prediction. It costs four matrix products per dense layer and no forward pass; a double
    backward through the KL costs six.

    Parameters that are frozen or that the prediction does not use have rows of exact zeros.

    Args:
        distribution: the prediction, with its graph: a torch distribution, or a dict, list or
            tuple of independent ones, or :class:`Weighted` for a weighted mean. The operator keeps
            the graph alive.
        params: the parameters, in the order of the flat vector. An existing
            :class:`ParameterVector` is used directly.
        backend: ``"tape"`` sweeps over the recorded graph, node by node, in memory that it keeps;
            ``"graph"`` is double backward through it, which is slower and needs less memory;
            ``"auto"`` is the first if it supports the graph and agrees with autograd, and the
            second otherwise. The attribute ``backend`` is the one in use.
        linearisation: the products with ``J``. The default is to read them from the graph.

    Attributes:
        joint: the prediction as a :class:`Joint` distribution.
        batch_size: the number of samples. The sum of their weights is ``total``.

    Raises:
        TypeError: a family is unknown or refused, or a parameter has a wrong type.
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
        self,
        distribution: Prediction | Joint,
        params: ParameterVector | Iterable[Tensor],
        *,
        backend: str = "auto",
        linearisation: Linearisation | None = None,
    ) -> None:
        vector = params if isinstance(params, ParameterVector) else ParameterVector(params)
        joint = distribution if isinstance(distribution, Joint) else joint_of(distribution)
        if linearisation is None:
            linearisation = linearise(joint.flat_parameters(), vector, backend)
        super().__init__(linearisation, joint.fisher(), joint.total)
        self.joint, self.batch_size = joint, joint.batch_size

    @classmethod
    def from_function(
        cls,
        fn: Callable[..., Prediction],
        params: Mapping[str, Tensor],
        *inputs: Any,
        backend: str = "auto",
        subsample: float | None = None,
        seed: int = 0,
    ) -> Self:
        """Return the Fisher matrix of the prediction ``fn(params, *inputs)`` in ``params``.

        It needs no graph and works under :func:`torch.func.vmap` over stacked parameters. The
        flat vector has the order of the dict.

        Args:
            fn: ``(params, *inputs)`` -> the prediction.
            params: the parameters by name; they need not require a gradient.
            *inputs: the other arguments of ``fn``.
            backend: as for the class, or ``"functional"``, which runs ``fn`` again for each product
                with the random numbers of the first run. ``"auto"`` chooses it under a transform
                and for models that cannot be differentiated twice.
            subsample: the count or the fraction of the samples to use, see :func:`subsample`.
            seed: the seed of the subsample.

        Raises:
            TypeError: ``params`` is not a dict, or a family is unknown or refused.
            ValueError: as for the class, or a subsample cannot index the inputs.
            RuntimeError: no method of differentiation supports the model.

        Example:
            >>> from torch.distributions import Normal
            >>> def predict(params, x):
            ...     return Normal(x * params["w"], 0.5)
            >>> x, stacked, V = torch.tensor([1.0, 2.0]), torch.zeros(3, 1), torch.ones(3, 1)
            >>> def product(w, v):
            ...     return FisherOperator.from_function(predict, {"w": w}, x).mv(v)
            >>> torch.func.vmap(product)(stacked, V).T
            tensor([[10., 10., 10.]])

        """

        def graph(distribution: Prediction, leaves: dict[str, Tensor]) -> Self:
            vector = ParameterVector(leaves.values(), list(leaves))
            return cls(distribution, vector, backend=backend)

        def functional(run: Run, vector: ParameterVector) -> Self:
            def joint_at(*tensors: Tensor) -> Joint:
                return joint_of(run(dict(zip(vector.names, tensors, strict=True))))

            linearisation = FunctionalLinearisation(
                lambda *p: joint_at(*p).flat_parameters(), vector
            )
            return cls(joint_at(*vector.params), vector, linearisation=linearisation)

        chosen = select(inputs, subsample, seed)
        return from_function(fn, params, chosen, backend, graph, functional)

    @torch.no_grad()
    def root(self) -> FisherRoot:
        r"""Return ``R`` of shape ``(m, n)`` with :math:`R'R = F`, a map for least squares.

        ``lsqr(F.root(), y, damping=d)`` solves :math:`(F + d I) x = R'y`, and
        :meth:`FisherRoot.lift` returns the ``y`` with :math:`R'y = g` for the gradient ``g`` of a
        loss. It needs no more iterations than :func:`cg`. In float32, measured on linear models
        with condition numbers of ``F`` from 1e2 to 1e6 and a damping of 1e-6 times its largest
        eigenvalue, its error is 5 to 1e5 times smaller where ``R x`` can come close to ``y``. Where
        most of ``y`` is out of reach, as for the gradient of noisy labels, the problem itself is as
        sensitive as the condition number of ``F``: the error is between 1000 times smaller and 200
        times larger, and reliably smaller only for an ``F`` of deficient rank and moderate
        condition.

        With ``C`` outputs per sample, the cost is ``C + 1`` products with the metric, none with the
        network, and the eigenvectors of N matrices ``(C, C)`` in float64; the memory is N C^2. It
        is therefore meant for few outputs per sample: ``C`` counts all factors, and is ``d + d^2``
        for a ``MultivariateNormal``.

        Raises:
            ValueError: samples share parameters of the family; see :class:`FisherRoot`.

        Example:
            >>> from torch.distributions import Categorical
            >>> W, v = torch.zeros(2, 3, requires_grad=True), torch.tensor([3.0, 0, 0, 0, 6, 0])
            >>> F = FisherOperator(Categorical(logits=torch.eye(2) @ W), [W])
            >>> R = F.root()
            >>> R.shape, torch.allclose(R.rmv(R.mv(v)), F @ v)
            ((6, 6), True)

        """
        return FisherRoot(self.jacobian, self.joint)
