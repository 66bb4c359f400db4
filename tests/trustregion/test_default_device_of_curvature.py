"""Curvature lives on the device of its tensors, whatever torch's default device is.

"meta" stands for an accelerator: a tensor that is made there by mistake cannot be used.
"""

import pytest
import torch
from torch import nn
from torch.distributions import (
    Categorical,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
)
from torch.distributions.transforms import AffineTransform
from torch.nn.functional import cross_entropy, huber_loss

from trustregion import FisherOperator, GGNOperator, HessianOperator, mean_kl, subsample, to_dense
from trustregion.linearise import choose, linearise
from trustregion.operators import (
    BatchedOperator,
    DenseOperator,
    EmpiricalFisherOperator,
    Identity,
    MonteCarloFisherOperator,
    check_symmetric,
    output_hessian,
    to_scipy,
)
from trustregion.operators.gauss_newton import GaussNewtonOperator
from trustregion.preconditioners import KFAC, Jacobi, Nystrom, kfac_layers
from trustregion.vector import ParameterVector


@pytest.fixture
def elsewhere(monkeypatch):
    """Make another device the default one within a test, in which nothing is known yet."""
    monkeypatch.setattr(output_hessian, "_AGREED", set())
    monkeypatch.setattr(kfac_layers, "_AGREED", set())
    monkeypatch.setattr(choose, "_AGREED", set())
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    return net, torch.randn(6, 3), torch.randint(3, (6,))


@pytest.fixture
def parameters():
    torch.manual_seed(1)
    return torch.randn(5, 2), torch.eye(2).expand(5, 2, 2).contiguous()


def fisher(net, x, _):
    return FisherOperator(Categorical(logits=net(x)), net.parameters())


OPERATORS = {
    "fisher": fisher,
    "ggn": lambda net, x, y: GGNOperator(cross_entropy(z := net(x), y), z, net.parameters()),
    "ggn of another loss": lambda net, x, _: GGNOperator(
        huber_loss(z := net(x), z.detach() + 0.1), z, net.parameters()
    ),
    "hessian": lambda net, x, y: HessianOperator(cross_entropy(net(x), y), net.parameters()),
    "empirical": lambda net, x, y: EmpiricalFisherOperator(
        cross_entropy(net(x), y, reduction="none"), net.parameters()
    ),
    "monte carlo": lambda net, x, _: MonteCarloFisherOperator(
        Categorical(logits=net(x)), net.parameters()
    ),
    "batches": lambda net, x, y: BatchedOperator(lambda b: fisher(net, b, y), list(x.split(4))),
    "a part": lambda net, x, _: FisherOperator.from_function(
        lambda p, x: Categorical(logits=torch.func.functional_call(net, p, (x,))),
        dict(net.named_parameters()),
        x,
        subsample=3,
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_those_of_the_default_default(name, problem, request):
    expected = to_dense(OPERATORS[name](*problem))
    request.getfixturevalue("elsewhere")
    A = OPERATORS[name](*problem)
    check_symmetric(A)
    assert torch.equal(to_dense(A), expected)


def blocks(net, x, _):
    """A metric that is neither a scaling nor that of a softmax, for each sample."""
    z = net(x)
    K = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 1.0], [0.0, 1.0, 2.0]], device="cpu")
    vector = ParameterVector(net.parameters())
    return GaussNewtonOperator(linearise([z], vector), lambda d: (d[0] @ K,), 6)


PRECONDITIONERS = {
    "kfac": (lambda net: KFAC(net), fisher),
    "kfac of the first layer": (lambda net: KFAC(net[0]), fisher),
    "kfac exact": (lambda net: KFAC(net, samples="exact"), fisher),
    "kfac of blocks": (lambda net: KFAC(net), blocks),
    "jacobi": (lambda _: Jacobi(), fisher),
    "jacobi of blocks": (lambda _: Jacobi(), blocks),
    "jacobi exact": (lambda _: Jacobi(probes="exact"), fisher),
    "nystrom": (lambda _: Nystrom(5), fisher),
}


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_preconditioners_are_those_of_the_default_default(name, problem, request):
    make, operator = PRECONDITIONERS[name]
    expected = to_dense(make(problem[0]).build(operator(*problem), 0.1))
    request.getfixturevalue("elsewhere")
    M = make(problem[0]).build(operator(*problem), 0.1)
    assert torch.equal(to_dense(M), expected)


FAMILIES = {
    "mvn": lambda loc, tril: MultivariateNormal(loc, scale_tril=tril, validate_args=False),
    "low rank": lambda loc, tril: LowRankMultivariateNormal(
        loc, tril[..., :1], loc.square() + 1, validate_args=False
    ),
    "transformed": lambda loc, _: TransformedDistribution(
        Normal(loc, loc.square() + 1, validate_args=False), AffineTransform(1.0, 2.0)
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_distributions_are_those_of_the_default_default(name, parameters, request):
    loc, tril = parameters
    make = FAMILIES[name]

    def both():
        old, new = make(loc, tril), make(loc + 0.1, tril)
        x = loc.clone().requires_grad_()
        return mean_kl(old, new), to_dense(FisherOperator(make(x, tril), [x]))

    expected = both()
    request.getfixturevalue("elsewhere")
    assert all(map(torch.equal, both(), expected))


def test_a_root_is_that_of_the_default_default(problem, request):
    expected = fisher(*problem).root().rows()
    request.getfixturevalue("elsewhere")
    assert torch.equal(fisher(*problem).root().rows(), expected)


def test_positions_of_a_subsample_index_tensors_of_the_cpu(elsewhere):
    x = torch.arange(16.0, device="cpu")
    assert len(x[subsample(16, 4)]) == 4


def test_operators_of_numpy_have_their_dtype(elsewhere):
    A = to_scipy(DenseOperator(torch.eye(2, device="cpu", dtype=torch.float64)))
    assert A.dtype == "float64"
    assert (Identity(3) @ torch.ones(3, device="cpu") == 1).all()
