import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as td
from torch import nn
from torch.nn import functional as nnf

import oracles
from laws import check_operator
from trustregion import FisherOperator, Identity, to_dense
from trustregion.operators import ParameterVector
from trustregion.operators.ggn import GGNOperator

F64 = torch.float64
N, C = 7, 4
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
LABELS = torch.tensor([0, 3, 1, 1, 2, 0, 3])
TARGETS = torch.randn(N, C, generator=torch.Generator().manual_seed(2), dtype=F64)
CLOSED, BACKWARD = "closed form", "double backward"


def layers(dtype=F64):
    g = torch.Generator().manual_seed(3)
    draw = [torch.randn(s, generator=g, dtype=F64) for s in ((5, 3), (5,), (C, 5), (C,))]
    return [(0.7 * t).to(dtype).requires_grad_() for t in draw]


def model(p, x=X):
    return torch.tanh(x.to(p[0].dtype) @ p[0].T + p[1]) @ p[2].T + p[3]


def ce(y, **options):
    return nnf.cross_entropy(y, LABELS, **options)


def like(t, y):
    return t.to(y.dtype)


LOSSES = {
    "mse mean": (lambda y: nnf.mse_loss(y, like(TARGETS, y)), CLOSED),
    "mse sum": (lambda y: nnf.mse_loss(y, like(TARGETS, y), reduction="sum"), CLOSED),
    "mse swapped": (lambda y: nnf.mse_loss(like(TARGETS, y), y), CLOSED),
    "mse of itself": (lambda y: nnf.mse_loss(2 * y, y), BACKWARD),
    "mse broadcast": (lambda y: ((y - 1.0) ** 2).mean(), BACKWARD),
    "ce mean": (ce, CLOSED),
    "ce sum": (lambda y: ce(y, reduction="sum"), CLOSED),
    "ce weighted mean": (
        lambda y: ce(y, weight=like(torch.tensor([0.5, 2.0, 1.0, 0.1]), y)),
        CLOSED,
    ),
    "ce weighted sum": (
        lambda y: ce(y, weight=like(torch.tensor([0.5, 2.0, 1.0, 0.1]), y), reduction="sum"),
        CLOSED,
    ),
    "ce ignored": (lambda y: ce(y, ignore_index=1), CLOSED),
    "ce ignored by default": (
        lambda y: nnf.cross_entropy(y, LABELS.where(LABELS != 3, -100)),
        CLOSED,
    ),
    "ce ignored and weighted": (
        lambda y: ce(y, ignore_index=0, weight=like(torch.tensor([0.5, 2.0, 1.0, 0.1]), y)),
        CLOSED,
    ),
    "ce of softmaxed": (lambda y: nnf.nll_loss(nnf.log_softmax(y, 1), LABELS), CLOSED),
    "ce of softmaxed, counted from the end": (
        lambda y: nnf.nll_loss(nnf.log_softmax(y, -1), LABELS),
        CLOSED,
    ),
    "ce over samples": (lambda y: nnf.nll_loss(nnf.log_softmax(y, 0), LABELS), BACKWARD),
    "ce of one sample": (lambda y: nnf.cross_entropy(y[0], LABELS[0]), BACKWARD),
    "ce of probabilities": (
        lambda y: nnf.cross_entropy(y, torch.softmax(like(TARGETS, y), 1)),
        BACKWARD,
    ),
    "ce smoothed": (lambda y: ce(y, label_smoothing=0.1), BACKWARD),
    "bce mean": (
        lambda y: nnf.binary_cross_entropy_with_logits(y, like(TARGETS > 0, y)),
        CLOSED,
    ),
    "bce sum": (
        lambda y: nnf.binary_cross_entropy_with_logits(y, like(TARGETS > 0, y), reduction="sum"),
        CLOSED,
    ),
    "bce weighted": (
        lambda y: nnf.binary_cross_entropy_with_logits(
            y, like(TARGETS > 0, y), pos_weight=like(torch.tensor([1.0, 2.0, 3.0, 4.0]), y)
        ),
        BACKWARD,
    ),
    "bce weighted by sample": (
        lambda y: nnf.binary_cross_entropy_with_logits(
            y, like(TARGETS > 0, y), weight=like(TARGETS.abs(), y)
        ),
        BACKWARD,
    ),
    "gaussian, fixed scale": (
        lambda y: -td.Normal(y, 0.5).log_prob(like(TARGETS, y)).sum(1).mean(),
        BACKWARD,
    ),
    "categorical": (lambda y: -td.Categorical(logits=y).log_prob(LABELS).mean(), BACKWARD),
    "poisson": (lambda y: nnf.poisson_nll_loss(y, like(TARGETS.abs().round(), y)), BACKWARD),
    "user's own": (lambda y: (y.logsumexp(1) ** 2).mean() + y[:, 0].exp().sum(), BACKWARD),
    "half of it": (lambda y: 0.5 * ce(y), BACKWARD),
}
each_loss = pytest.mark.parametrize("name", list(LOSSES))


@each_loss
def test_ggn_equals_jacobian_hessian_jacobian(name):
    loss, form = LOSSES[name]
    params = layers()
    y = model(params)
    G = GGNOperator(loss(y), y, params)
    assert G.output_hessian == form
    dense = oracles.gauss_newton(model, loss, params)
    check_operator(G, dense)
    assert torch.linalg.eigvalsh(to_dense(G))[0] >= -1e-12 * dense.abs().max()


@each_loss
def test_float32_agrees_with_float64(name):
    loss, form = LOSSES[name]
    params = layers(torch.float32)
    y = model(params)
    G = GGNOperator(loss(y), y, params)
    exact = oracles.gauss_newton(model, loss, layers())
    assert G.output_hessian == form
    # 1e-5 of the largest entry: rounding of chained float32 passes
    atol = 1e-5 * exact.abs().max().item()
    torch.testing.assert_close(to_dense(G).double(), exact, rtol=0, atol=atol)


def test_cross_entropy_of_one_sample_is_a_closed_form():
    y = torch.randn(C, dtype=F64, requires_grad=True)
    G = GGNOperator(nnf.cross_entropy(y, LABELS[0]), y, [y])
    assert G.output_hessian == CLOSED
    p = torch.softmax(y.detach(), 0)
    check_operator(G, torch.diag(p) - p.outer(p))


def test_several_outputs():
    params = layers()

    def two(p):
        y = model(p)
        return y[:, :2] * 1.0, torch.sin(y[:, 2:])

    def loss(ys):
        return (ys[0] ** 2).mean() + (ys[0].sum(1) - ys[1].exp().sum(1)).cosh().mean()

    ys = two(params)
    G = GGNOperator(loss(ys), list(ys), params)
    check_operator(G, oracles.gauss_newton(two, loss, params))


def test_an_output_that_the_loss_leaves_out_and_one_without_a_graph():
    params = layers()
    y = model(params)
    ys = (y * 1.0, y * 2.0, TARGETS)
    G = GGNOperator(nnf.mse_loss(ys[0], ys[2]), ys, params)
    check_operator(G, oracles.gauss_newton(model, LOSSES["mse mean"][0], params))


def test_a_linear_loss_has_no_curvature():
    params = layers()
    y = model(params)
    assert not to_dense(GGNOperator(y.sum(), y, params)).any()


def test_ggn_of_cross_entropy_is_the_fisher():
    params = layers()
    y = model(params)
    G = GGNOperator(nnf.cross_entropy(y, LABELS), y, ParameterVector(params))
    F = FisherOperator(td.Categorical(logits=model(params)), params)
    check_operator(G, to_dense(F))


def test_ggn_of_a_linear_model_is_the_hessian():
    W = torch.randn(3, C, dtype=F64, requires_grad=True)
    y = X @ W
    G = GGNOperator(ce(y), y, [W])
    check_operator(G, oracles.loss_hessian(lambda p: ce(X @ p[0]), [W]))


@given(st.floats(-200, 200), st.sampled_from(["mse mean", "bce sum", "ce mean", "user's own"]))
def test_a_scaled_loss_scales_the_operator_exactly(power, name):
    params = layers()
    y = model(params)
    v = torch.ones(44, dtype=F64)
    scale = 2.0 ** round(power)
    loss = LOSSES[name][0](y)
    plain, scaled = GGNOperator(1.0 * loss, y, params), GGNOperator(scale * loss, y, params)
    assert torch.equal(scaled @ v, scale * (plain @ v))


MODELS = {
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, C)
        ),
        torch.randn(N, 2, 4, 4, dtype=F64),
    ),
    "norms": (
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.GroupNorm(2, 4), nn.Linear(4, C)
        ),
        X,
    ),
    "batch norm in train mode": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.SiLU(), nn.Linear(4, C)),
        X,
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Linear(6, C)),
        torch.randint(6, (N, 2)),
    ),
    "dropout in eval mode": (lambda: nn.Sequential(nn.Linear(3, C), nn.Dropout()).eval(), X),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_the_operator_of_a_module_is_the_dense_one(name):
    build, x = MODELS[name]
    torch.manual_seed(0)
    module = build().double()
    names, params = zip(*module.named_parameters(), strict=True)

    def predict(p):
        return torch.func.functional_call(module, dict(zip(names, p, strict=True)), (x,))

    y = module(x)
    G = GGNOperator(ce(y), y, module.parameters())
    check_operator(G, oracles.gauss_newton(predict, ce, params))


def test_tied_and_frozen_parameters():
    W, frozen = torch.randn(3, 3, dtype=F64, requires_grad=True), torch.randn(3, dtype=F64)
    unused = torch.randn(2, dtype=F64, requires_grad=True)

    def tied(p):
        return torch.tanh(X @ p[0] + frozen) @ p[0].T

    labels = LABELS % 3
    y = tied([W])
    G = GGNOperator(nnf.cross_entropy(y, labels), y, [unused, W, frozen])
    dense = oracles.gauss_newton(tied, lambda y: nnf.cross_entropy(y, labels), [W])
    check_operator(G, torch.block_diag(torch.zeros(2, 2), dense, torch.zeros(3, 3)).to(F64))
    assert G.used == (1,)


def gaussian_nll(mean, log_scale, target=TARGETS[:, :1]):
    return -td.Normal(mean, log_scale.exp()).log_prob(target).mean()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_loss_that_is_not_convex_in_the_outputs_is_refused(dtype):
    params = layers(dtype)
    mean, log_scale = model(params)[:, :2].split(1, 1)
    with pytest.raises(ValueError, match=r"not convex in the outputs.*HessianOperator.*Fisher"):
        GGNOperator(
            gaussian_nll(mean, log_scale, TARGETS[:, :1].to(dtype)), (mean, log_scale), params
        )
    y = model(params)
    for loss in (-nnf.mse_loss(y, torch.zeros_like(y)), y.sin().sum(), (y[:, 0] * y[:, 1]).sum()):
        with pytest.raises(ValueError, match="not convex"):
            GGNOperator(loss, y, params)


def test_a_negative_curvature_of_one_sample_in_fifty_is_seen():
    curvature = torch.linspace(1, 3, 500, dtype=F64)
    curvature[::50] = -1.0
    y = torch.zeros(500, dtype=F64, requires_grad=True)
    with pytest.raises(ValueError, match="not convex"):
        GGNOperator((curvature * y**2).sum(), y, [y])
    GGNOperator((curvature.abs() * y**2).sum(), y, [y])


@pytest.mark.parametrize("scale", [1e-290, 1e-100, 1.0, 1e100, 1e290])
def test_convexity_is_relative_to_the_size_of_the_curvature(scale):
    y = torch.randn(4, 3, dtype=F64, requires_grad=True)
    GGNOperator(scale * (y**2).mean(), y, [y])
    with pytest.raises(ValueError, match="not convex"):
        GGNOperator(scale * ((y[:, 1:] ** 2).sum() - y[0, 0] ** 2), y, [y])


def test_a_loss_that_is_not_finite_does_not_raise():
    y = torch.full((3, 2), torch.inf, requires_grad=True)
    assert not (GGNOperator((y**4).mean(), y, [y]) @ torch.ones(6)).isfinite().all()


def test_the_check_draws_no_global_random_number():
    y = torch.randn(4, 3, requires_grad=True)
    state = torch.get_rng_state()
    GGNOperator((y**2).mean(), y, [y])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_penalty_past_the_outputs_is_named_with_the_way_out():
    params = layers()
    y = model(params)
    named = ParameterVector(params, ["w", "b", "v", "c"])
    # far below what a comparison of gradients would see
    penalty = 1e-200 * params[2].square().sum()
    with pytest.raises(ValueError, match=r"parameter v also past.*weight_decay \* Identity"):
        GGNOperator(ce(y) + penalty, y, named)
    G = GGNOperator(ce(y), y, params) + 0.1 * Identity(44, F64)
    exact = oracles.gauss_newton(model, ce, params) + 0.1 * torch.eye(44, dtype=F64)
    check_operator(G, exact)


def test_another_output_of_the_same_node_is_not_taken_for_the_one_given():
    params = layers()
    first, second = model(params).chunk(2, 1)
    with pytest.raises(ValueError, match="also past the outputs"):
        GGNOperator((first**2 + second**2).mean(), first, params)
    GGNOperator((first**2 + second**2).mean(), (first, second), params)


def test_a_parameter_may_be_an_output_itself():
    params, extra = layers(), torch.randn(3, dtype=F64, requires_grad=True)

    def loss(ys):
        return nnf.mse_loss(ys[0], TARGETS) + (ys[1].sum() - ys[0].sum()) ** 2

    y = model(params)
    G = GGNOperator(loss((y, extra)), (y, extra), [*params, extra])
    check_operator(G, oracles.gauss_newton(lambda p: (model(p), p[4]), loss, [*params, extra]))


def test_outputs_that_depend_on_each_other_are_refused_and_a_copy_mends_it():
    params = layers()
    y, bias = model(params), params[3]

    def loss(ys):
        return nnf.mse_loss(ys[0], TARGETS) + 3 * ys[1].square().sum()

    with pytest.raises(ValueError, match=r"output 1 was used to compute another.*clone"):
        GGNOperator(loss((y, bias)), (y, bias), params)
    copy = bias.clone()
    G = GGNOperator(loss((y, copy)), (y, copy), params)
    check_operator(G, oracles.gauss_newton(lambda p: (model(p), p[3]), loss, params))


def test_wrong_arguments_are_named():
    params = layers()
    y = model(params)
    with pytest.raises(ValueError, match=r"of shape \(\), got shape \(7,\).*mean"):
        GGNOperator(y.sum(1), y, params)
    with pytest.raises(TypeError, match="got float"):
        GGNOperator(1.0, y, params)
    with pytest.raises(TypeError, match=r"tuple of tensors.*got str"):
        GGNOperator(y.sum(), "ab", params)
    with pytest.raises(ValueError, match="loss carries no graph"):
        GGNOperator(ce(y).detach(), y, params)
    with pytest.raises(ValueError, match="loss does not depend on the outputs"):
        GGNOperator(ce(torch.zeros(N, C, requires_grad=True) * 1.0), y, params)
    with pytest.raises(ValueError, match="very tensors"):
        GGNOperator(ce(y.detach().requires_grad_() * 1.0), y, params)
    with pytest.raises(ValueError, match="outputs carry no graph"):
        GGNOperator(ce(y), y.detach(), params)
    with pytest.raises(ValueError, match="outputs do not depend on the parameters"):
        GGNOperator(ce(y), y, [torch.zeros(2, requires_grad=True)])
    with pytest.raises(ValueError, match="all of them are frozen"):
        GGNOperator(ce(y), y, [p.detach() for p in params])
    with pytest.raises(ValueError, match="empty batch"):
        GGNOperator(ce(y), y[:0], params)
    with pytest.raises(ValueError, match="backend must be one of"):
        GGNOperator(ce(y), y, params, backend="backward")


@pytest.mark.parametrize("loss", [ce, lambda y: ce(y, label_smoothing=0.1)])
def test_a_freed_graph_is_named(loss):
    params = layers()
    y = model(params)
    value = loss(y)
    value.backward()
    with pytest.raises(RuntimeError, match="already freed"):
        GGNOperator(value, y, params)


def test_a_product_runs_the_output_hessian_once_and_no_forward_pass():
    calls = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            calls.append("forward")
            return x * x

        @staticmethod
        def backward(ctx, grad):
            calls.append("backward")
            (x,) = ctx.saved_tensors
            return 2 * x * grad

    params = layers()
    y = model(params)
    G = GGNOperator(Square.apply(y).mean(), y, params)
    calls.clear()
    G @ torch.ones(44, dtype=F64)
    assert calls == []  # the derivative of ``backward`` is torch's own
    dense = oracles.gauss_newton(model, lambda y: (y * y).mean(), params)
    check_operator(G, dense)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what the peer calls in torch
@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (nn.MSELoss(), TARGETS),
        (nn.CrossEntropyLoss(), LABELS),
        (nn.CrossEntropyLoss(reduction="sum"), LABELS),
        (nn.BCEWithLogitsLoss(), (TARGETS > 0).double()),
    ],
)
def test_a_peer_agrees(loss, targets):
    curvlinops = pytest.importorskip("curvlinops")
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, C)).double()
    params = [p for _, p in module.named_parameters()]
    theirs = curvlinops.GGNLinearOperator(module, loss, params, [(X, targets)])
    y = module(X)
    G = GGNOperator(loss(y, targets), y, module.parameters())
    check_operator(G, theirs @ torch.eye(44, dtype=F64))
