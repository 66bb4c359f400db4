"""Complex weights kept as real pairs, at any offset; and embeddings with sparse gradients."""

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Normal
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

import oracles
from trustregion import (
    FisherOperator,
    GGNOperator,
    HessianOperator,
    NaturalTrustRegion,
    NewtonTrustRegion,
    to_dense,
)
from trustregion.operators import (
    EmpiricalFisherOperator,
    KLHessianOperator,
    MonteCarloFisherOperator,
)
from trustregion.vector import ParameterVector, split_like

F64 = torch.float64
X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
Y = torch.tensor([0, 1, 2, 2, 1])


class Waves(nn.Module):
    """A bias of any size, and complex weights as real pairs behind it, in one of two shapes."""

    def __init__(self, before, flat):
        super().__init__()
        torch.manual_seed(2)
        self.before = nn.Parameter(torch.randn(before, dtype=F64))
        pairs = torch.randn(3, 4, 2, dtype=F64)
        self.weight = nn.Parameter(pairs.flatten() if flat else pairs)
        self.out = nn.Linear(4, 3).double()

    def forward(self, x, real=False):
        w = self.weight.view(3, 4, 2)
        if real:  # the same without complex numbers
            size = ((x @ w[..., 0]).square() + (x @ w[..., 1]).square()).sqrt()
        else:
            w = torch.view_as_complex(w)
            size = (x.to(w.dtype) @ w).abs()
        return self.out(size + self.before.sum())


def logits_operators(net):
    z = net(X)
    params = list(net.parameters())
    p = z.softmax(-1)
    exact = exact_ggn(net, torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1))
    yield FisherOperator(Categorical(logits=z), params), exact
    yield KLHessianOperator(Categorical(logits=z), params), exact
    yield GGNOperator(cross_entropy(z, Y), z, params), exact
    named = dict(net.named_parameters())
    for backend in ("graph", "functional"):
        yield (
            FisherOperator.from_function(
                lambda q, x: Categorical(logits=functional_call(net, q, (x,))),
                named,
                X,
                backend=backend,
            ),
            exact,
        )


def exact_ggn(net, metric):
    params = list(net.parameters())
    rows = [torch.autograd.grad(y, params, retain_graph=True) for y in net(X).flatten()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).view(5, 3, -1)
    return torch.einsum("nip,nij,njq->pq", J, metric, J) / 5


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("before", [1, 2])
def test_operators_of_complex_pairs_are_those_of_a_dense_jacobian(before, flat):
    net = Waves(before, flat)
    for A, exact in logits_operators(net):
        torch.testing.assert_close(to_dense(A), exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("before", [1, 2])
def test_hessians_of_complex_pairs_are_those_of_autograd(before, flat):
    net = Waves(before, flat)
    names = [n for n, _ in net.named_parameters()]
    vector = ParameterVector(net.parameters())

    def loss(theta):
        parts = zip(names, vector.unravel(theta), strict=True)
        return cross_entropy(functional_call(net, dict(parts), (X, True)), Y)

    exact = torch.autograd.functional.hessian(loss, vector.values())
    named = dict(net.named_parameters())
    made = [HessianOperator(cross_entropy(net(X), Y), net.parameters())]
    made += [
        HessianOperator.from_function(
            lambda q, x: cross_entropy(functional_call(net, q, (x,)), Y), named, X, backend=backend
        )
        for backend in ("graph", "functional")
    ]
    for A in made:
        torch.testing.assert_close(to_dense(A), exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("before", [1, 2])
def test_products_of_complex_pairs_can_be_batched(before):
    net = Waves(before, flat=False)
    named = dict(net.named_parameters())
    stacked = {n: torch.stack([p.detach(), p.detach() + 0.1]) for n, p in named.items()}
    n = sum(p.numel() for p in named.values())
    v = torch.randn(2, n, dtype=F64)

    def product(q, v):
        F = FisherOperator.from_function(
            lambda q, x: Categorical(logits=functional_call(net, q, (x,)), validate_args=False),
            q,
            X,
        )
        return F.mv(v)

    batched = torch.func.vmap(product)(stacked, v)
    for i in range(2):
        one = product({n: p[i] for n, p in stacked.items()}, v[i])
        torch.testing.assert_close(batched[i], one, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("before", [1, 2])
def test_outputs_may_be_complex_pairs_too(before):
    torch.manual_seed(3)
    bias = torch.randn(before, dtype=F64, requires_grad=True)
    w = torch.randn(3, 2, 2, dtype=F64, requires_grad=True)

    def outputs(bias, w):
        return oracles.flatten((bias.exp(), torch.stack([X @ w[..., 0], X @ w[..., 1]], -1)))

    z = X.to(torch.complex128) @ torch.view_as_complex(w)
    ys = (bias.exp(), torch.view_as_real(z))
    loss = mse_loss(ys[1], torch.ones_like(ys[1]), reduction="sum") + ys[0].square().sum()
    G = GGNOperator(loss, ys, [bias, w])
    J = torch.autograd.functional.jacobian(outputs, (bias, w))
    J = torch.cat([part.flatten(1) for part in J], 1)
    torch.testing.assert_close(to_dense(G), 2 * J.T @ J, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(G.jacobian.rows(), J, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("before", [1, 2])
def test_both_optimizers_train_complex_pairs(before):
    def natural(net):
        def closure():
            d = Categorical(logits=net(X))
            return -d.log_prob(Y).mean(), d

        return NaturalTrustRegion(net.parameters()), closure

    def newton(net):
        return NewtonTrustRegion(net.parameters()), lambda: cross_entropy(net(X), Y)

    def ggn(net):
        def closure():
            z = net(X)
            return cross_entropy(z, Y), z

        return NewtonTrustRegion(net.parameters(), curvature="ggn"), closure

    for make in (natural, newton, ggn):
        net = Waves(before, flat=False)
        start = cross_entropy(net(X), Y).item()
        optimizer, closure = make(net)
        for _ in range(3):
            optimizer.step(closure)
            assert optimizer.info.accepted
        assert cross_entropy(net(X), Y).item() < start


def test_parts_at_even_offsets_are_views_and_others_copies_of_the_same_bits():
    tensors = [torch.empty(2, 2), torch.empty(3), torch.empty(3, 2), torch.empty(1)]
    v = torch.randn(14)
    parts = split_like(v, tensors)
    assert [p.shape for p in parts] == [t.shape for t in tensors]
    assert torch.equal(torch.cat([p.flatten() for p in parts]), v)
    assert [p.untyped_storage().data_ptr() == v.data_ptr() for p in parts] == [
        True,
        True,
        False,
        False,
    ]
    shifted = torch.randn(15)[1:]
    assert all(p.storage_offset() % 2 == 0 for p in split_like(shifted, tensors))


def sparse_net(kind):
    torch.manual_seed(0)
    ids = torch.tensor([[1, 2], [1, 0], [3, 3]])
    layer = kind(4, 2, sparse=True)
    head = nn.Linear(2, 3)

    def run():
        out = layer(ids)
        return head(out.sum(1) if out.ndim == 3 else out)

    return run, [*layer.parameters(), *head.parameters()]


LABELS = torch.tensor([0, 2, 1])
SPARSE = {
    "fisher": lambda z, ps, b: FisherOperator(Categorical(logits=z), ps, backend=b),
    "ggn": lambda z, ps, b: GGNOperator(cross_entropy(z, LABELS), z, ps, backend=b),
    "empirical": lambda z, ps, b: EmpiricalFisherOperator(
        cross_entropy(z, LABELS, reduction="none"), ps, backend=b
    ),
    "monte carlo": lambda z, ps, b: MonteCarloFisherOperator(Normal(z, 1.0), ps, backend=b),
    "hessian": lambda z, ps, _: HessianOperator(cross_entropy(z, LABELS), ps),
    "kl hessian": lambda z, ps, _: KLHessianOperator(Categorical(logits=z), ps),
}


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("backend", ["auto", "graph", "tape"])
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_gradients_are_refused_by_name(name, backend, kind):
    run, params = sparse_net(kind)
    vector = ParameterVector(params, ["table", "weight", "bias"])
    alone = backend == "tape" and "hessian" not in name
    if alone and kind is nn.EmbeddingBag:
        return  # the tape has no rule for it
    expected = RuntimeError if alone else TypeError
    with pytest.raises(expected, match="sparse=False") as caught:
        SPARSE[name](run(), vector, backend) @ torch.ones(vector.numel)
    assert alone or "parameter table is sparse" in str(caught.value)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_optimizers_refuse_sparse_gradients_by_name(kind):
    run, params = sparse_net(kind)
    before = [p.detach().clone() for p in params]
    for curvature in ("hessian", "ggn"):

        def closure():
            z = run()
            loss = cross_entropy(z, LABELS)
            return loss if curvature == "hessian" else (loss, z)  # noqa: B023 # called at once

        with pytest.raises(TypeError, match="sparse=False"):
            NewtonTrustRegion(params, curvature=curvature).step(closure)
    assert all(map(torch.equal, params, before))
