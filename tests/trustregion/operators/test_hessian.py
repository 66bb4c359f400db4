import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as td
from torch import nn
from torch.nn import functional as nnf

import oracles
from cases import cases
from laws import check_operator
from trustregion import FisherOperator, KLHessianOperator, minres, to_dense
from trustregion.operators import ParameterVector
from trustregion.operators.hessian import HessianOperator

F64 = torch.float64
X = torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
LABELS = torch.tensor([0, 3, 1, 1, 2, 0, 3])


def layers(dtype=F64):
    g = torch.Generator().manual_seed(3)
    draw = [torch.randn(s, generator=g, dtype=F64) for s in ((5, 3), (5,), (4, 5), (4,))]
    return [(0.7 * t).to(dtype).requires_grad_() for t in draw]


def model(p):
    return torch.tanh(X.to(p[0].dtype) @ p[0].T + p[1]) @ p[2].T + p[3]


LOSSES = {
    "cross-entropy": lambda p: nnf.cross_entropy(model(p), LABELS),
    "not convex": lambda p: model(p).sin().sum() * p[1].sum(),
    "with a penalty": lambda p: model(p).exp().mean() + sum(t.square().sum() for t in p),
    "linear in some": lambda p: (p[0] ** 3).sum() + p[3].sum(),
}
each_loss = pytest.mark.parametrize("name", list(LOSSES))


@each_loss
def test_hessian_and_gradient_equal_torchs(name):
    loss, params = LOSSES[name], layers()
    H = HessianOperator(loss(params), params)
    check_operator(H, oracles.loss_hessian(loss, params))
    grads = torch.autograd.grad(loss(params), params, allow_unused=True)
    exact = ParameterVector(params).ravel(grads)
    torch.testing.assert_close(H.gradient, exact, rtol=1e-14, atol=0)
    assert not H.gradient.requires_grad
    assert H.backend == "graph"
    assert H.used == tuple(i for i, g in enumerate(grads) if g is not None)


@each_loss
def test_float32_agrees_with_float64(name):
    loss, params = LOSSES[name], layers(torch.float32)
    exact = oracles.loss_hessian(loss, layers())
    dense = to_dense(HessianOperator(loss(params), params))
    assert dense.dtype == torch.float32
    # 1e-5 of the largest entry: rounding of chained float32 passes
    atol = 1e-5 * exact.abs().max().item()
    torch.testing.assert_close(dense.double(), exact, rtol=0, atol=atol)


@given(st.integers(-900, 900))
def test_a_scaled_loss_scales_hessian_and_gradient_exactly(power):
    x = torch.tensor([0.3, -1.7, 2.2], dtype=F64, requires_grad=True)
    v = torch.tensor([1.0, 2.0, -0.5], dtype=F64)

    def loss(scale):
        return scale * (x[0] * x[1].exp() + x.square().sum() * x[2])

    plain, scaled = HessianOperator(loss(1.0), [x]), HessianOperator(loss(2.0**power), [x])
    assert torch.equal(scaled @ v, 2.0**power * (plain @ v))
    assert torch.equal(scaled.gradient, 2.0**power * plain.gradient)


def test_a_linear_loss_has_a_hessian_of_zeros():
    params = layers()
    H = HessianOperator(sum(p.sum() for p in params), params)
    assert not to_dense(H).any()
    assert torch.equal(H.gradient, torch.ones(44, dtype=F64))


def test_a_parameter_may_be_the_loss_itself():
    x = torch.tensor(2.0, requires_grad=True)
    H = HessianOperator(x, [x])
    assert (H @ torch.ones(1), H.gradient) == (torch.zeros(1), torch.ones(1))


def test_unused_and_frozen_parameters_have_rows_of_exact_zeros():
    w, unused, frozen = (torch.randn(3, dtype=F64) for _ in range(3))
    w.requires_grad_(), unused.requires_grad_()
    H = HessianOperator((w**4 * frozen).sum(), [unused, w, frozen])
    exact = torch.zeros(9, 9, dtype=F64)
    exact[3:6, 3:6] = torch.diag(12 * w.detach() ** 2 * frozen)
    check_operator(H, exact)
    assert not to_dense(H)[:3].any()
    assert not to_dense(H)[6:].any()
    assert not H.gradient[:3].any()
    assert H.used == (1,)


def test_the_operator_of_a_module_is_the_dense_one():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv1d(1, 2, 2), nn.SiLU(), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 4)
    ).double()
    names, params = zip(*module.named_parameters(), strict=True)

    def loss(p):
        y = torch.func.functional_call(module, dict(zip(names, p, strict=True)), X.unsqueeze(1))
        return nnf.cross_entropy(y, LABELS)

    H = HessianOperator(loss(params), ParameterVector(module.parameters()))
    check_operator(H, oracles.loss_hessian(loss, params))


def test_a_newton_step_solves_an_indefinite_quadratic():
    A = torch.diag(torch.tensor([3.0, -1.0, 0.5], dtype=F64))
    x = torch.ones(3, dtype=F64, requires_grad=True)
    H = HessianOperator(0.5 * x @ A @ x - x.sum(), [x])
    step = minres(H, -H.gradient, rtol=1e-12).x
    torch.testing.assert_close(x.detach() + step, 1 / A.diagonal(), rtol=1e-10, atol=0)


def test_a_product_is_one_backward_pass_and_no_forward_pass():
    calls = []

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calls.append("forward")
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return Slope.apply(x) * grad

    class Slope(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 3 * x**2

        @staticmethod
        def backward(ctx, grad):
            calls.append("second")
            return 6 * ctx.saved_tensors[0] * grad

    x = torch.tensor([1.0, 2.0], requires_grad=True)
    H = HessianOperator(Cube.apply(x).sum(), [x])
    calls.clear()
    assert torch.equal(H @ torch.ones(2), torch.tensor([6.0, 12.0]))
    assert calls == ["second"]
    assert x.grad is None


def test_wrong_arguments_are_named():
    params = layers()
    y = model(params)
    with pytest.raises(ValueError, match=r"of shape \(\), got shape \(7, 4\).*mean"):
        HessianOperator(y, params)
    with pytest.raises(TypeError, match="scalar tensor, got float"):
        HessianOperator(1.0, params)
    with pytest.raises(ValueError, match="loss carries no graph"):
        HessianOperator(y.sum().detach(), params)
    for others in ([torch.ones(2, requires_grad=True)], [p.detach() for p in params]):
        with pytest.raises(ValueError, match="loss does not depend on the parameters"):
            HessianOperator(y.sum(), others)
    with pytest.raises(ValueError, match="params is empty"):
        HessianOperator(y.sum(), [])
    loss = y.exp().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="already freed"):
        HessianOperator(loss, params)


def test_values_that_are_not_finite_do_not_raise():
    x = torch.tensor([torch.inf, 1.0], requires_grad=True)
    H = HessianOperator((x**4).sum(), [x])
    assert not (H @ torch.ones(2)).isfinite().all()


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_kl_hessian_takes_a_parameter_vector_and_has_no_gradient(case):
    H = KLHessianOperator(case.predict(case.params), ParameterVector(case.params))
    dense = to_dense(FisherOperator(case.predict(case.params), case.params))
    check_operator(H, dense)
    # a KL is stationary where the two distributions are equal
    assert H.gradient.abs().max() <= 1e-12 * dense.abs().max()


def test_a_kl_without_parameters_is_refused():
    with pytest.raises(ValueError, match="distribution does not depend"):
        KLHessianOperator(td.Normal(X, 1.0), layers())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what the peer calls in torch
def test_a_peer_agrees():
    curvlinops = pytest.importorskip("curvlinops")
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    params = [p for _, p in module.named_parameters()]
    theirs = curvlinops.HessianLinearOperator(module, nn.CrossEntropyLoss(), params, [(X, LABELS)])
    H = HessianOperator(nnf.cross_entropy(module(X), LABELS), module.parameters())
    check_operator(H, theirs @ torch.eye(44, dtype=F64))


@pytest.mark.parametrize("backend", ["graph", "functional"])
def test_over_an_empty_batch_it_is_zero_also_where_the_loss_is_nan(backend):
    params = {"w": torch.ones(3, dtype=torch.float64)}
    H = HessianOperator.from_function(
        lambda p: (torch.zeros(0, 3, dtype=torch.float64) @ p["w"]).square().mean(),
        params,
        backend=backend,
    )
    assert not to_dense(H).any()
    assert not H.gradient.any()
