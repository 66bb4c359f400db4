"""What may be given as a preconditioner, and metrics that couple samples."""

import pytest
import torch
from torch import nn

from trustregion import GGNOperator, Identity, Status, cg, to_dense
from trustregion.preconditioners import KFAC, Gated, Jacobi, Nystrom, Recycled
from trustregion.preconditioners.gate import check_preconditioner


@pytest.mark.parametrize(
    "given",
    [
        None,
        Jacobi(),
        Nystrom(2),
        Recycled(),
        KFAC(nn.Linear(2, 2)),
        Gated(Jacobi()),
        Identity(3),
        torch.eye(3),
        lambda v: v,
    ],
)
def test_what_can_be_a_preconditioner_is_taken(given):
    check_preconditioner(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (KFAC, r"must be an instance, got the class KFAC: pass KFAC\(module\)"),
        (Jacobi, r"class Jacobi: pass Jacobi\(\)"),
        (Nystrom, r"class Nystrom: pass Nystrom\(rank\)"),
        (Gated, r"class Gated: pass Gated\(Jacobi\(\)\)"),
        (nn.Linear, r"class Linear: pass an instance, such as KFAC\(module\)"),
        ("kfac", r"name 'kfac': pass KFAC\(module\)"),
        ("Jacobi", r"name 'Jacobi': pass Jacobi\(\)"),
        ("diag", r"name 'diag': pass an instance"),
        (True, r"got bool"),
        (0.5, r"got float"),
        ([Jacobi()], r"got list"),
        (torch.ones(3), r"square matrix, got shape \(3,\)"),
    ],
)
def test_what_cannot_is_refused_with_the_instance_that_may_be_meant(given, message):
    with pytest.raises(TypeError, match=message):
        check_preconditioner(given)


def contrastive(x, W):
    """A loss that is convex in the outputs, whose Hessian there couples all samples."""
    z = x @ W
    centered = z - z.mean(0)
    return centered.square().sum() + 0.1 * z.square().sum(), z


def coupled_ggn():
    torch.manual_seed(0)
    x = torch.randn(8, 3, dtype=torch.float64)
    W = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    loss, z = contrastive(x, W)
    return GGNOperator(loss, z, [W])


def test_jacobi_takes_a_metric_that_couples_samples_by_hutchinsons_estimate():
    G = coupled_ggn()
    n = G.shape[0]
    jacobi = Jacobi(1.0, probes=2000, seed=1)
    M = jacobi.build(G, 0.0)
    assert (jacobi.products, jacobi.overhead) == (2000, 0.0)
    scaled = (M @ torch.ones(n, dtype=torch.float64)) * to_dense(G).diagonal()
    # the noise of 2000 probes, in a matrix whose entries off the diagonal are as large
    torch.testing.assert_close(scaled / scaled[0], torch.ones_like(scaled), rtol=0.1, atol=0)
    b = torch.ones(n, dtype=torch.float64)
    assert cg(G, b, M=M, max_iter=n).status is Status.CONVERGED


def test_kfac_refuses_it_and_names_itself_and_jacobi():
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 2).double(), torch.randn(8, 3, dtype=torch.float64)
    z = layer(x)
    loss = (z - z.mean(0)).square().sum() + 0.1 * z.square().sum()
    with pytest.raises(ValueError, match=r"KFAC needs a metric.*sample by sample.*such as Jacobi"):
        KFAC(layer).build(GGNOperator(loss, z, layer.parameters()), 0.1)
