"""The Fisher, Gauss-Newton and Hessian operators of a function of the parameters."""

import math

import pytest
import torch
from torch import distributions as td
from torch.func import vmap
from torch.nn import functional as nnf

import oracles
from cases import cases
from function_cases import F64, N, X, close, noise
from trustregion import FisherOperator, subsample, to_dense
from trustregion.autodiff import under_transform
from trustregion.operators import ParameterVector
from trustregion.operators.ggn import GGNOperator
from trustregion.operators.hessian import HessianOperator

CASES = {case.name: case for case in cases()}


LABELS = torch.tensor([0, 1, 1, 0, 0, 1])


def as_dict(case):
    return {f"p{i}": p.detach() for i, p in enumerate(case.params)}


@pytest.mark.parametrize("backend", ["auto", "graph", "functional"])
@pytest.mark.parametrize("name", list(CASES))
def test_fisher_of_a_function_equals_the_fisher_of_its_prediction(name, backend):
    case = CASES[name]
    F = FisherOperator.from_function(
        lambda p: case.predict(list(p.values())), as_dict(case), backend=backend
    )
    exact = FisherOperator(case.predict(case.params), case.params)
    close(to_dense(F), to_dense(exact), 1e-12)
    assert F.batch_size == exact.batch_size
    assert torch.equal(F @ torch.ones(F.shape[0], dtype=F64), F @ torch.ones(F.shape[0], dtype=F64))
    assert (F.backend == "functional") == (backend == "functional")


def test_the_root_works_by_torch_func_too():
    case = CASES["categorical"]
    F = FisherOperator.from_function(
        lambda p: case.predict(list(p.values())), as_dict(case), backend="functional"
    )
    R, v = F.root(), torch.randn(F.shape[0], dtype=F64)
    close(R.rmv(R.mv(v)), F @ v, 1e-10)


@pytest.mark.parametrize("name", [n for n in CASES if "multivariate" not in n])
def test_vmap_of_each_family_equals_the_loop(name, monkeypatch):
    monkeypatch.setattr(td.Distribution, "_validate_args", True)  # torch.compile turns it off
    case = CASES[name]
    stacked = {k: torch.stack([p, 0.9 * p]) for k, p in as_dict(case).items()}
    n = sum(p.numel() for p in case.params)
    V = torch.randn(2, n, dtype=F64)

    def product(p, v):
        return FisherOperator.from_function(lambda p: case.predict(list(p.values())), p).mv(v)

    loop = [product({k: p[i] for k, p in stacked.items()}, V[i]) for i in range(2)]
    # randomness="same": the cases draw their data from a generator of its own
    close(vmap(product, randomness="same")(stacked, V), torch.stack(loop), 1e-12)
    assert td.Distribution._validate_args


def model(p, x=X):
    return torch.tanh(x @ p["w"]) @ p["v"]


def small(dtype=F64):
    return {"w": noise(3, 4, seed=2).to(dtype), "v": noise(4, 2, seed=3).to(dtype)}


def ce(y, labels):
    return nnf.cross_entropy(y, labels)


def smooth(y, labels):
    return nnf.cross_entropy(y, labels, label_smoothing=0.2)


def as_list(fn):
    return lambda p: fn(dict(zip(("w", "v"), p, strict=True)))


@pytest.mark.parametrize("loss", [ce, smooth])
@pytest.mark.parametrize("backend", ["auto", "graph", "functional"])
def test_ggn_of_a_function(loss, backend):
    params = small()
    G = GGNOperator.from_function(model, params, X, loss=loss, targets=LABELS, backend=backend)
    exact = oracles.gauss_newton(as_list(model), lambda y: loss(y, LABELS), list(params.values()))
    close(to_dense(G), exact)
    how = {ce: "closed form", smooth: "double backward"}[loss]
    assert G.output_hessian == ("forward over reverse" if backend == "functional" else how)
    assert not any(p.requires_grad for p in params.values())


@pytest.mark.parametrize("backend", ["graph", "functional"])
def test_ggn_of_several_outputs_and_no_targets(backend):
    def fn(p):
        return X @ p["w"], torch.tanh(X @ p["w"]) @ p["v"]

    def loss(ys):
        return ys[0].square().mean() + (ys[1].sum(1) - ys[0].sum(1)).cosh().mean()

    params = small()
    G = GGNOperator.from_function(fn, params, loss=loss, backend=backend)
    close(to_dense(G), oracles.gauss_newton(as_list(fn), loss, list(params.values())))


@pytest.mark.parametrize("backend", ["graph", "functional"])
def test_ggn_of_a_function_refuses_a_loss_that_is_not_convex(backend):
    with pytest.raises(ValueError, match="not convex in the outputs"):
        GGNOperator.from_function(model, small(), X, loss=lambda y: y.sin().sum(), backend=backend)


@pytest.mark.parametrize("loss", [ce, smooth])
def test_vmap_of_the_ggn_equals_the_loop(loss):
    stacked = {k: torch.stack([p, 2 * p]) for k, p in small().items()}
    V = torch.randn(2, 20, dtype=F64)

    def product(p, v):
        return GGNOperator.from_function(model, p, X, loss=loss, targets=LABELS).mv(v)

    loop = [product({k: p[i] for k, p in stacked.items()}, V[i]) for i in range(2)]
    close(vmap(product)(stacked, V), torch.stack(loop), 1e-12)


Y = noise(N, 2, seed=9)


REGRESSION = {
    "mse": nnf.mse_loss,
    "mse in a function": lambda y, t: nnf.mse_loss(y, t),
    "mse, summed": lambda y, t: nnf.mse_loss(y, t, reduction="sum"),
    "huber": nnf.huber_loss,
    "smooth": nnf.smooth_l1_loss,
    "soft margin": lambda y, t: nnf.soft_margin_loss(y, t.sign()),
    "Gaussian": lambda y, t: nnf.gaussian_nll_loss(y, t, t.square() + 1),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's loop, for one of them
@pytest.mark.parametrize("name", list(REGRESSION))
def test_losses_without_a_forward_derivative_by_torch_func(name):
    loss, params = REGRESSION[name], small()
    exact = oracles.gauss_newton(as_list(model), lambda y: loss(y, Y), list(params.values()))

    def ggn(p):
        return GGNOperator.from_function(model, p, X, loss=loss, targets=Y, backend="functional")

    close(to_dense(ggn(params)), exact)
    assert ggn(params).output_hessian == (
        "closed form" if name == "mse" else "forward over reverse"
    )

    def value(p):
        return loss(model(p, X), Y)

    H = HessianOperator.from_function(value, params, backend="functional")
    close(to_dense(H), oracles.loss_hessian(as_list(value), list(params.values())))
    stacked = {k: torch.stack([p, 2 * p]) for k, p in params.items()}
    V = torch.randn(2, 20, dtype=F64)
    for product in (
        lambda p, v: ggn(p).mv(v),
        lambda p, v: HessianOperator.from_function(value, p).mv(v),
    ):
        loop = [product({k: p[i] for k, p in stacked.items()}, V[i]) for i in range(2)]
        close(vmap(product)(stacked, V), torch.stack(loop), 1e-12)


def test_mse_loss_under_two_nested_vmaps_equals_the_loop():
    stacked = {k: torch.stack([p, 2 * p]) for k, p in small().items()}
    inputs, v = torch.stack([X, -X, 3 * X]), torch.randn(20, dtype=F64)

    def product(p, x):
        return GGNOperator.from_function(model, p, x, loss=nnf.mse_loss, targets=Y).mv(v)

    found = vmap(vmap(product, in_dims=(None, 0)), in_dims=(0, None))(stacked, inputs)
    for i in range(2):
        for j in range(3):
            close(found[i, j], product({k: p[i] for k, p in stacked.items()}, inputs[j]), 1e-12)


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_mse_loss_of_targets_that_repeat_is_no_closed_form():
    params = {"w": noise(3, seed=2)}

    def fn(p, x):
        return x @ p["w"]

    targets = Y[:, :1]  # (N, 1) against (N,): N^2 terms
    G = GGNOperator.from_function(
        fn, params, X, loss=nnf.mse_loss, targets=targets, backend="functional"
    )
    exact = oracles.gauss_newton(
        lambda p: X @ p[0], lambda y: nnf.mse_loss(y, targets), list(params.values())
    )
    close(to_dense(G), exact)
    assert G.output_hessian == "forward over reverse"


@pytest.mark.parametrize("backend", ["graph", "functional"])
def test_a_loss_that_is_no_scalar_is_named(backend):
    def rows(y, labels=LABELS):
        return nnf.cross_entropy(y, labels, reduction="none")

    with pytest.raises(ValueError, match=r"scalar tensor of shape \(\), got shape \(6,\): reduce"):
        GGNOperator.from_function(model, small(), X, loss=rows, targets=LABELS, backend=backend)
    with pytest.raises(ValueError, match=r"scalar tensor of shape \(\), got shape \(6,\): reduce"):
        HessianOperator.from_function(lambda p: rows(model(p, X)), small(), backend=backend)
    with pytest.raises(TypeError, match="scalar tensor, got float"):
        HessianOperator.from_function(lambda _: 1.0, small(), backend=backend)


@pytest.mark.parametrize("kind", ["Fisher", "GGN", "Hessian"])
def test_products_after_the_parameters_moved_are_refused(kind):
    params = small()
    make = {
        "Fisher": lambda **b: FisherOperator.from_function(
            lambda p: td.Normal(model(p, X), 1.0), params, **b
        ),
        "GGN": lambda **b: GGNOperator.from_function(
            model, params, X, loss=ce, targets=LABELS, **b
        ),
        "Hessian": lambda **b: HessianOperator.from_function(mean_loss, params, **b),
    }[kind]
    A, v = make(backend="functional"), torch.randn(20, dtype=F64)
    A @ v
    params["v"].mul_(2)
    with pytest.raises(RuntimeError, match="parameters have moved"):
        A @ v
    close(make(backend="functional") @ v, make(backend="graph") @ v)


def test_half_a_product_after_the_parameters_moved_is_refused():
    params = small()
    F = FisherOperator.from_function(
        lambda p: td.Normal(model(p, X), 1.0), params, backend="functional"
    )
    u = F.jvp(torch.randn(20, dtype=F64))
    params["w"].mul_(2)
    for half in (lambda: F.jvp(torch.ones(20, dtype=F64)), lambda: F.vjp(u)):
        with pytest.raises(RuntimeError, match="parameters have moved"):
            half()


def mean_loss(p, x=X, labels=LABELS):
    return nnf.cross_entropy(model(p, x), labels) + p["w"].square().sum()


@pytest.mark.parametrize("backend", ["auto", "graph", "functional"])
def test_hessian_of_a_function(backend):
    params = small()
    H = HessianOperator.from_function(mean_loss, params, X, LABELS, backend=backend)
    close(to_dense(H), oracles.loss_hessian(as_list(mean_loss), list(params.values())))
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    grads = torch.autograd.grad(mean_loss(leaves), list(leaves.values()))
    close(H.gradient, ParameterVector(leaves.values()).ravel(grads), 1e-14)
    assert not H.gradient.requires_grad
    assert H.backend == ("functional" if backend == "functional" else "graph")
    assert H.used == (0, 1)


def test_vmap_of_the_hessian_equals_the_loop():
    stacked = {k: torch.stack([p, 2 * p]) for k, p in small().items()}
    V = torch.randn(2, 20, dtype=F64)

    def product(p, v):
        H = HessianOperator.from_function(mean_loss, p, X, LABELS)
        return H.mv(v), H.gradient

    loop = [product({k: p[i] for k, p in stacked.items()}, V[i]) for i in range(2)]
    for got, exact in zip(vmap(product)(stacked, V), zip(*loop, strict=True), strict=True):
        close(got, torch.stack(exact), 1e-12)


def test_a_transform_is_noticed():
    seen = []

    def look(x):
        seen.append(under_transform())
        return x.sum()

    assert not under_transform()
    x = torch.ones(2, 3)
    vmap(look)(x), torch.func.grad(look)(x), torch.func.jvp(look, (x,), (x,))
    torch.func.vjp(look, x)
    assert seen == [True] * 4
    with torch.no_grad():
        assert not under_transform()


def test_memory_is_shared_and_the_parameters_are_left_alone():
    params = small()
    seen = []

    def fn(p):
        seen.append({k: t.data_ptr() for k, t in p.items()})
        return td.Categorical(logits=model(p))

    with torch.no_grad():
        F = FisherOperator.from_function(fn, params)
    F @ torch.ones(20, dtype=F64)
    assert seen == [{k: p.data_ptr() for k, p in params.items()}]
    leaves = [p.clone().requires_grad_() for p in params.values()]
    exact = FisherOperator(td.Categorical(logits=as_list(model)(leaves)), leaves)
    close(to_dense(F), to_dense(exact), 1e-12)
    assert not any(p.requires_grad for p in params.values())


def test_the_order_is_that_of_the_dict():
    params = small()
    swapped = dict(reversed(params.items()))

    def fn(p):
        return td.Categorical(logits=model(p))

    D, E = (to_dense(FisherOperator.from_function(fn, p)) for p in (params, swapped))
    order = [*range(12, 20), *range(12)]
    close(E, D[order][:, order], 1e-12)


SUBSAMPLED = {
    "fisher": lambda p, **o: FisherOperator.from_function(
        lambda p, x: td.Categorical(logits=model(p, x)), p, X, **o
    ),
    "ggn": lambda p, **o: GGNOperator.from_function(model, p, X, loss=ce, targets=LABELS, **o),
    "hessian": lambda p, **o: HessianOperator.from_function(
        lambda p, x, y: nnf.cross_entropy(model(p, x), y), p, X, LABELS, **o
    ),
}


each_kind = pytest.mark.parametrize("kind", list(SUBSAMPLED))


@each_kind
def test_a_subsample_is_that_of_the_positions_it_names(kind):
    global X, LABELS
    params, whole = small(), (X, LABELS)
    A = SUBSAMPLED[kind](params, subsample=3, seed=4)
    again = SUBSAMPLED[kind](params, subsample=0.5, seed=4)
    keep = subsample(N, 3, seed=4)
    try:
        X, LABELS = X[keep], LABELS[keep]
        exact = to_dense(SUBSAMPLED[kind](params))
    finally:
        X, LABELS = whole
    close(to_dense(A), exact, 1e-12)
    assert torch.equal(to_dense(A), to_dense(again))
    assert not torch.allclose(to_dense(SUBSAMPLED[kind](params, subsample=3, seed=5)), exact)


@each_kind
@pytest.mark.slow
def test_a_subsample_is_unbiased(kind):
    params = small()
    exact = to_dense(SUBSAMPLED[kind](params))
    parts = torch.stack(
        [to_dense(SUBSAMPLED[kind](params, subsample=2, seed=k)) for k in range(150)]
    )
    # of each entry five standard errors: a chance below 1e-6 each, at seeds that are fixed
    error = parts.std(0) / math.sqrt(len(parts))
    assert ((parts.mean(0) - exact).abs() <= 5 * error + 1e-12 * exact.abs().max()).all()
    assert error.max() > 1e-3 * exact.abs().max()


def test_wrong_arguments_are_named():
    def fn(p, *_):
        return td.Categorical(logits=model(p))

    params = small()
    with pytest.raises(TypeError, match=r"dict of tensors by name.*got list"):
        FisherOperator.from_function(fn, list(params.values()))
    with pytest.raises(ValueError, match="params is empty"):
        FisherOperator.from_function(fn, {}, backend="functional")
    with pytest.raises(ValueError, match=r"backend must be one of auto, .*functional, got 'tpae'"):
        FisherOperator.from_function(fn, params, backend="tpae")
    for inputs in ((), (X, 1.0), (X, X[:2]), (torch.tensor(1.0),)):
        with pytest.raises(ValueError, match="subsample= indexes the first dimension"):
            FisherOperator.from_function(fn, params, *inputs, subsample=1)
    with pytest.raises(TypeError, match="parameter w must be a tensor, got float"):
        FisherOperator.from_function(fn, {"w": 1.0})
    with torch.inference_mode(), pytest.raises(RuntimeError, match="lets nothing be diff"):
        FisherOperator.from_function(fn, params)
    with pytest.raises(TypeError, match="prediction must be a torch distribution"):
        FisherOperator.from_function(model, params)
    with pytest.raises(ValueError, match="do not depend on the parameters"):
        GGNOperator.from_function(
            lambda _: torch.ones(3, requires_grad=True) * 1, params, loss=lambda y: (y**2).sum()
        )
    with pytest.raises(ValueError, match=r"shape \(\), got shape \(6, 2\)"):
        HessianOperator.from_function(model, params)
    with pytest.raises(TypeError, match=r"tuple of tensors.*got Categorical"):
        GGNOperator.from_function(lambda p: [fn(p)], params, loss=lambda y: y)


def test_an_error_of_the_function_passes_unchanged():
    def fn(p):
        raise RuntimeError("mine")

    for backend in ("auto", "functional"):
        with pytest.raises(RuntimeError, match=r"^mine$"):
            FisherOperator.from_function(fn, small(), backend=backend)
