"""Fisher matrices from scores, at the labels of the data or at labels drawn from the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..distributions import Prediction, Weighted
from ..distributions.prediction import batch_size_of, checked_weights, leaves_of
from ..linearise import linearise
from ..vector import ParameterVector
from .gauss_newton import GaussNewtonOperator, Tensors


class EmpiricalFisherOperator(GaussNewtonOperator):
    r"""The matrix :math:`\frac1N \sum_i g_i g_i'` of shape ``(n, n)`` of per-sample gradients.

    :math:`g_i` is the gradient of the log-likelihood or of the loss of sample *i*; the sign does
    not matter. The matrix is positive semidefinite of rank at most ``N``. It is not an estimate of
    the Fisher matrix, since the labels are those of the data and not drawn from the model.

    Args:
        log_probs: per-sample log-likelihoods or losses, shape ``(N,)``, with their graph.
        params: the parameters, in the order of the flat vector. An existing
            :class:`ParameterVector` is used directly.
        backend: the method of differentiation, as for :class:`FisherOperator`.

    Attributes:
        batch_size: the number of samples ``N``, which is ``total`` as well.

    Raises:
        TypeError: ``log_probs`` is not a tensor.
        ValueError: ``log_probs`` has another shape, is empty, or does not depend on the parameters.
        RuntimeError: a part of the model cannot be differentiated twice, or its graph was freed.

    Example:
        >>> w = torch.zeros(2, requires_grad=True)
        >>> losses = torch.tensor([[1.0, 0.0], [1.0, 2.0]]) @ w
        >>> EmpiricalFisherOperator(losses, [w]) @ torch.tensor([1.0, 0.0])
        tensor([1., 1.])

    References:
        Kunstner, Balles and Hennig, Limitations of the Empirical Fisher Approximation, 2019.

    """

    def __init__(
        self,
        log_probs: Tensor,
        params: ParameterVector | Iterable[Tensor],
        *,
        backend: str = "auto",
    ) -> None:
        vector = params if isinstance(params, ParameterVector) else ParameterVector(params)
        if not isinstance(log_probs, Tensor):
            raise TypeError(
                f"log_probs must be a tensor of shape (N,), got {type(log_probs).__name__}"
            )
        if log_probs.ndim != 1 or not log_probs.numel():
            raise ValueError(
                "log_probs must hold one log-likelihood or loss per sample, shape (N,) with N > 0,"
                f" got shape {tuple(log_probs.shape)}: sum over the other dimensions of a sample,"
                " and use reduction='none'"
            )
        self.batch_size = log_probs.numel()
        super().__init__(linearise((log_probs,), vector, backend), _identity, self.batch_size)


class MonteCarloFisherOperator(GaussNewtonOperator):
    r"""The estimate :math:`\frac{1}{SN} \sum_{s,i} g_{si} g_{si}'` of the Fisher matrix.

    :math:`g_{si}` is the gradient of :math:`\log p(y_{si} | x_i)` at an outcome :math:`y_{si}`
    drawn from the model's own prediction. Its expectation over the seed is the Fisher matrix
    :math:`\frac1N \sum_i \mathrm{E}_y[g_i g_i']`; its rank is at most ``S N``, and its error falls
    as :math:`1/\sqrt{S N}`. A distribution needs ``sample`` and ``log_prob`` only, so that families
    without a closed form, such as mixtures, are supported. The score must have mean zero, which
    excludes families whose support depends on the parameters.

    The outcomes are drawn once, at construction. Torch's global generators are left as they were.

    Args:
        distribution: the prediction, with its graph: a torch distribution, or a dict, list or tuple
            of independent ones, whose log-probabilities are added. The first dimension of the batch
            shape is the batch; the others are summed over. With :class:`Weighted` the outer
            products are weighted; outcomes are also drawn for samples of weight 0, and discarded,
            so that the parameters of these samples must be valid too.
        params: the parameters, in the order of the flat vector. An existing
            :class:`ParameterVector` is used directly.
        samples: the number ``S`` of outcomes per sample. The cost and the memory of the family are
            proportional to it; those of the network do not depend on it.
        seed: the seed of the draw.
        backend: the method of differentiation, as for :class:`FisherOperator`.

    Attributes:
        batch_size: the number of samples ``N``. The sum of their weights is ``total``.
        sample_weights: the weights in float64; ones if the prediction is not weighted.

    Raises:
        TypeError: a part of the prediction is not a distribution.
        ValueError: no outcome can be drawn, the prediction or the batch is empty, the factors have
            different batch sizes, the weights do not fit the batch, ``samples`` is not a positive
            integer, or the prediction does not depend on the parameters.
        RuntimeError: a part of the model cannot be differentiated twice, or its graph was freed.

    Example:
        >>> from torch.distributions import StudentT
        >>> mean = torch.zeros(1, requires_grad=True)
        >>> d = StudentT(3.0, mean.expand(2000))
        >>> F = MonteCarloFisherOperator(d, [mean], samples=10)
        >>> F @ torch.ones(1)  # (3 + 1) / (3 + 3) in expectation
        tensor([0.6631])

    References:
        Martens, New Insights and Perspectives on the Natural Gradient Method, 2020, section 5.

    """

    def __init__(
        self,
        distribution: Prediction,
        params: ParameterVector | Iterable[Tensor],
        *,
        samples: int = 1,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        vector = params if isinstance(params, ParameterVector) else ParameterVector(params)
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples must be a positive integer, got {samples!r}")
        weighted = isinstance(distribution, Weighted)
        leaves = list(leaves_of(distribution.prediction if weighted else distribution))
        batches = {f"{path}{type(d).__name__}": d.batch_shape for path, d in leaves}
        self.batch_size = batch_size_of(batches)
        if weighted:
            weights = checked_weights(distribution.weights, batches, vector.device)
        else:
            weights = torch.ones(self.batch_size, dtype=torch.float64, device=vector.device)
        self.sample_weights = weights
        log_probs = _drawn([d for _, d in leaves], weights, samples, seed)
        counted = (weights[weights > 0] / samples).to(log_probs.dtype)
        super().__init__(
            linearise((log_probs,), vector, backend),
            lambda d: (d[0] * counted,),
            weights.sum().item(),
        )


def _identity(d: Tensors) -> Tensors:
    return d


def _drawn(factors: Sequence[Distribution], weights: Tensor, samples: int, seed: int) -> Tensor:
    """Return the log-probabilities ``(S, K)`` of outcomes, for the samples of positive weight."""
    device = weights.device
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=_kind(device)):
        torch.manual_seed(seed)
        with torch.no_grad():
            outcomes = [_outcome(d, samples) for d in factors]
    with torch.enable_grad():
        parts = [
            d.log_prob(y).reshape(samples, *weights.shape, -1).sum(-1)
            for d, y in zip(factors, outcomes, strict=True)
        ]
        return torch.stack(parts).sum(0)[:, weights > 0]


def _outcome(d: Distribution, samples: int) -> Tensor:
    try:
        # A copy, since a transform with a cache recognizes its own outcome and returns the cached
        # value it came from, which would lose a derivative of log_prob.
        return d.sample(torch.Size([samples])).clone()
    except NotImplementedError:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"no outcome can be drawn from a {type(d).__name__}: its parameters must be valid, also"
            f" those of samples of weight 0, so give padding finite inputs (torch said: {error})"
        ) from error


def _kind(device: torch.device) -> str:
    return (
        "cuda" if device.type == "cpu" else device.type
    )  # fork_rng always restores the CPU's generator
