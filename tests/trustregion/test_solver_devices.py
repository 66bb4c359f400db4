"""The solvers work where the tensors are, whatever the default device is."""

import dataclasses

import pytest
import torch

from trustregion import Status, cg, gltr, lanczos, minres, steihaug
from trustregion.operators import DenseOperator
from trustregion.solvers import (
    constrained_kl_ball_step,
    diagonal,
    dual_solve,
    fixed_cg,
    kl_ball_step,
    largest_eigenvalues,
    lsqr,
    multishift_cg,
    reduction_ratio,
    trace,
    trust_region_dense,
)
from trustregion.solvers.nnls import least_distance, nnls

A = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
INDEFINITE = torch.diag(torch.tensor([-1.0, 2.0, 3.0, 4.0, 5.0]))
b = torch.ones(5)
HARD = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])  # orthogonal to the leftmost eigenvector
GROUPS = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0, 0.0]])

CALLS = {
    "cg": lambda: cg(A, b, M=A, reorthogonalize=True, verify=True),
    "cg, columns": lambda: cg(A, torch.stack([b, -b], dim=1)),
    "minres": lambda: minres(INDEFINITE, b, M=A, stop_at_negative_curvature=True),
    "minres, least squares": lambda: minres(torch.diag(HARD), b),
    "steihaug": lambda: steihaug(INDEFINITE, b, 1.0),
    "gltr": lambda: gltr(INDEFINITE, HARD, 10.0),
    "lanczos": lambda: lanczos(A, b, max_iter=3).solve(0.5),
    "multishift_cg": lambda: multishift_cg(A, b, [0.0, 1.0]),
    "trust_region_dense": lambda: trust_region_dense(INDEFINITE, HARD, 10.0, M=A),
    "fixed_cg": lambda: fixed_cg(A, b, 5, M=A),
    "lsqr": lambda: lsqr(A[:, :3], b, damping=0.1),
    "dual_solve, dual": lambda: dual_solve(
        A[:3], b[:3], damping=0.1, metric=A[:3, :3], method="dual"
    ),
    "dual_solve, primal": lambda: dual_solve(A[:3], b[:3], damping=0.1, method="primal"),
    "constrained": lambda: constrained_kl_ball_step(A, b, 0.1, GROUPS[0], -0.1),
    "contradicting constraints": lambda: constrained_kl_ball_step(A, b, 0.1, GROUPS, b[:2]),
    "kl_ball_step": lambda: kl_ball_step(-b, b, 0.1, damped_curvature=1.0, damping=0.0),
    "nnls": lambda: nnls(A, b),
    "least_distance": lambda: least_distance(A, b),
    "diagonal": lambda: diagonal(DenseOperator(A)),
    "diagonal, estimated": lambda: diagonal(DenseOperator(A), probes=2),
    "trace, estimated": lambda: trace(DenseOperator(A), probes=2),
    "largest_eigenvalues": lambda: largest_eigenvalues(DenseOperator(A), 2),
    "reduction_ratio": lambda: reduction_ratio(1.0, 0.5, 0.5),
}


def tensors(found):
    """Every tensor in a result."""
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, tuple):
        for item in found:
            yield from tensors(item)
    elif dataclasses.is_dataclass(found):
        for field in dataclasses.fields(found):
            yield from tensors(getattr(found, field.name))


@pytest.mark.parametrize("name", CALLS)
def test_another_default_device_changes_nothing(name):
    expected = CALLS[name]()
    torch.set_default_device("meta")  # stands for any device other than that of the tensors
    try:
        found = CALLS[name]()
    finally:
        torch.set_default_device(None)
    pairs = list(zip(tensors(expected), tensors(found), strict=True))
    assert all(x.device == y.device and torch.equal(x, y) for x, y in pairs)
    if not pairs:
        assert found == expected
    if isinstance(getattr(expected, "status", None), Status):
        assert found.status is expected.status
