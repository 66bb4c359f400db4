"""A square root of the Fisher matrix, for least-squares solvers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributions import Joint
from .map import LinearMap


class FisherRoot(LinearMap):
    r"""The map :math:`R = B J / \sqrt N` of shape ``(m, n)`` with :math:`R'R = F`.

    ``B`` is block diagonal with :math:`B_i' B_i = M_i`, the Fisher matrix of the family for sample
    *i*, of shape ``(C, C)`` over the ``C = m / N`` outputs of the sample. Row ``C i + k`` of ``R``
    belongs to sample *i*. From the eigenvectors of :math:`D_i^{-1} M_i D_i^{-1} = V_i' \Lambda_i
    V_i`, where the powers of two ``D`` bring the diagonal near one,

    .. math:: B_i = \Lambda_i^{1/2} V_i D_i,

    so that an output of a small scale is not lost in the rounding errors of one of a large scale.
    :math:`B_i` is an orthogonal matrix times the symmetric root of :math:`M_i`, which does not
    change a least-squares problem. Eigenvectors are not unique, so that a ``y`` of shape ``(m,)``
    is valid for the root that returned it only.

    The blocks are computed in float64 from the parameters of the distribution: in float32 the root
    of a block of deficient rank would have an error of the square root of the rounding unit.
    Eigenvalues within rounding of zero are set to zero. A sample whose block is not finite gives
    rows of NaN, for which a solver returns ``NONFINITE_OPERATOR``.

    :meth:`FisherOperator.root` constructs it.

    Args:
        J: the Jacobian of all parameters of the distribution, :attr:`FisherOperator.jacobian`.
        joint: the distribution.

    Raises:
        ValueError: a parameter tensor does not hold one slice per sample, or the Fisher matrix of
            the family couples samples.

    """

    def __init__(self, J: LinearMap, joint: Joint) -> None:
        super().__init__(*J.shape, J.dtype, J.device)
        self._J = J
        self._samples, self._widths = joint.batch_size, _widths(joint)
        V, D, values = factor_blocks(_blocks(joint, self._widths))
        sizes = values.div_(joint.total).sqrt_()
        self._V, self._D, self._sizes = V.to(J.dtype), D.to(J.dtype), sizes.to(J.dtype)

    @torch.no_grad()
    def mv(self, v: Tensor) -> Tensor:
        """Return ``R v`` of shape ``(m,)``. Cost: half a product with ``F``, and N C^2."""
        parts = self._J.mv(v).split([self._samples * width for width in self._widths])
        return (self._sizes * _times(self._V, self._D * _by_sample(parts, self._samples))).view(-1)

    @torch.no_grad()
    def rmv(self, u: Tensor) -> Tensor:
        """Return ``R' u`` of shape ``(n,)``. The cost is that of :meth:`mv`."""
        rows = self._D * _times(self._V.mT, self._sizes * u.view(self._samples, -1))
        return self._J.rmv(torch.cat([part.reshape(-1) for part in rows.split(self._widths, 1)]))

    @torch.no_grad()
    def lift(self, u: Tensor) -> Tensor:
        r"""Return ``y`` of shape ``(m,)`` with :math:`R'y = J'u`, without a product with ``J``.

        With ``u`` the derivative of a loss in the parameters of the distribution, ``lsqr(R, y,
        damping=d)`` solves :math:`(F + d I) x = g` for the gradient ``g`` of the loss. ``u`` must
        be in the range of ``M``; a component outside of it is dropped. For a ``Categorical`` the
        entries of each sample must sum to zero. This holds for the derivative of a loss that
        normalizes the logits itself, as in the example, and not for a derivative in
        ``distribution.logits``, which ``log_prob`` assumes to be normalized already. The ``M`` of
        the other families are invertible, over the lower triangle of a ``scale_tril``.

        Args:
            u: the derivative, of shape ``(m,)`` in the order of the rows of ``J``.

        Raises:
            ValueError: ``u`` has another shape or dtype.

        Example:
            >>> from torch.distributions import Categorical
            >>> from trustregion import FisherOperator
            >>> W, targets = torch.zeros(3, requires_grad=True), torch.tensor([0, 2])
            >>> d = Categorical(logits=W.expand(2, 3))
            >>> logits = d.logits.detach().requires_grad_()
            >>> loss = -Categorical(logits=logits).log_prob(targets).mean()
            >>> (u,) = torch.autograd.grad(loss, logits)
            >>> R = FisherOperator(d, [W]).root()
            >>> R.rmv(R.lift(u.flatten()))  # the gradient of the loss in W
            tensor([-0.1667,  0.3333, -0.1667])

        """
        if u.shape != (self.shape[0],) or u.dtype != self.dtype:
            raise ValueError(
                f"u must be a vector of shape ({self.shape[0]},) and dtype {self.dtype}, the"
                " concatenated derivatives of a loss in all parameter tensors of the distribution,"
                f" got shape {tuple(u.shape)} and dtype {u.dtype}"
            )
        parts = u.split([self._samples * width for width in self._widths])
        y = _times(self._V, _by_sample(parts, self._samples) / self._D)
        return torch.where(self._sizes > 0, y / self._sizes, 0.0).view(-1)


def _times(V: Tensor, rows: Tensor) -> Tensor:
    """Return the product of each sample's matrix ``(N, C, C)`` with its row ``(N, C)``."""
    return torch.bmm(V, rows.unsqueeze(2)).squeeze(2)


def _by_sample(tensors: tuple[Tensor, ...], samples: int) -> Tensor:
    """Return the ``(N, C)`` rows, one per sample, of tensors that hold one slice per sample."""
    return torch.cat([t.reshape(samples, -1) for t in tensors], dim=1)


def _widths(joint: Joint) -> list[int]:
    """Return the number of entries per sample of each parameter tensor."""
    samples = joint.batch_size
    for label, tensors in zip(joint.labels, joint.parameters, strict=True):
        for t in tensors:
            if samples > 1 and t.shape[:1] != (samples,):
                raise ValueError(
                    f"a root needs one slice of each parameter tensor for each of the {samples}"
                    f" samples, got a tensor of shape {tuple(t.shape)} in {label}: expand a"
                    f" parameter that all samples share to shape ({samples}, ...) where the family"
                    " reads its parameters"
                )
    return [t.numel() // samples for t in joint.flat_parameters()]


def _blocks(joint: Joint, widths: list[int]) -> Tensor:
    """Return the Fisher matrix of the family for each sample, ``(N, C, C)`` in float64."""
    frozen = joint.frozen()
    metric, outputs, samples = frozen.fisher(), frozen.flat_parameters(), joint.batch_size

    def products(rows: Tensor) -> Tensor:
        parts = zip(rows.split(widths, 1), outputs, strict=True)
        return _by_sample(metric(tuple(p.reshape(t.shape) for p, t in parts)), samples)

    like = outputs[0]
    # Zero times any finite number is an exact zero, so that no tolerance is needed.
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(samples, sum(widths), generator=generator, dtype=like.dtype, device="cpu")
    probe[1::2] = 0.0
    across = products(probe.to(like.device))[1::2]
    if bool((across.isfinite() & (across != 0)).any()):
        raise ValueError(
            "a root needs a Fisher matrix of the family that acts sample by sample, but a change"
            " of some samples' parameters has an effect on others: give each sample parameters of"
            " its own, over the first dimension"
        )
    blocks = like.new_empty(samples, sum(widths), sum(widths))
    for k in range(sum(widths)):
        unit = like.new_zeros(samples, sum(widths))
        unit[:, k] = 1.0
        blocks[:, :, k] = products(unit)
    return blocks


def factor_blocks(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``V``, ``D`` and the eigenvalues with ``M = D V' diag(values) V D`` for each block."""
    finite = blocks.isfinite().all(2).all(1)
    diagonal = blocks.diagonal(dim1=1, dim2=2)
    alive = finite.unsqueeze(1) & (diagonal > 0)
    _, e = torch.frexp(torch.where(alive, diagonal, 1.0))
    D = torch.ldexp(torch.ones_like(diagonal), e.div(2, rounding_mode="floor"))
    scaled = blocks / D.unsqueeze(2) / D.unsqueeze(1)
    # eigh raises if any block of the batch contains a NaN
    values, Q = torch.linalg.eigh(torch.where(finite.view(-1, 1, 1), scaled, 0.0))
    rounding = values.shape[1] * torch.finfo(values.dtype).eps * values[:, -1:]
    values = torch.where(values > rounding, values, 0.0)
    return Q.mT, D, torch.where(finite.unsqueeze(1), values, torch.nan)
