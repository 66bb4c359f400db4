"""Operators of a function, for modules of many kinds and each way of differentiating."""

import pytest
import torch
from torch import distributions as td
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as nnf
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import oracles
from function_cases import F64, N, X, close, noise
from trustregion import FisherOperator, to_dense
from trustregion.operators.ggn import GGNOperator
from trustregion.operators.hessian import HessianOperator


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cells = kind(3, 2, batch_first=True)

    def forward(self, x):
        return self.cells(x)[0][:, -1]


class FusedAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(noise(4, 4))

    def forward(self, x):
        return nnf.scaled_dot_product_attention(x @ self.query, x, x)[:, 0, :2]


class MultiHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0][:, 0, :2]


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def encoder():
    layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True, dropout=0.0)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 2))


def normed(wrap):
    return wrap(nn.Linear(3, 2))


S, Q = noise(N, 4, 3), noise(N, 3, 4)


# what builds the module, its input, and the ways that can: with a graph, by torch.func, under vmap
ROWS = {
    "dense": (mlp, X, "graph functional vmap"),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(4, 2)
        ),
        noise(N, 1, 4, 3),
        "graph functional vmap",
    ),
    "norms": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.SiLU()),
        X,
        "graph functional vmap",
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 2)),
        torch.arange(18).view(N, 3) % 5,
        "graph functional vmap",
    ),
    "LSTM": (lambda: Recurrent(nn.LSTM), S[..., :3], "graph functional"),
    "GRU": (lambda: Recurrent(nn.GRU), S[..., :3], "graph functional"),
    "RNN": (lambda: Recurrent(nn.RNN), S[..., :3], "graph functional"),
    "fused attention": (FusedAttention, Q, "graph functional vmap"),
    "multi-head attention": (MultiHead, Q, "graph functional vmap"),
    "transformer encoder": (encoder, Q, "graph functional vmap"),
    "batch norm in train mode": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
        X,
        "graph",
    ),
    "batch norm in eval mode": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval(),
        X,
        "graph functional vmap",
    ),
    "checkpoint": (Checkpointed, X, "graph"),
    "spectral norm": (
        lambda: normed(parametrizations.spectral_norm).eval(),
        X,
        "graph functional vmap",
    ),
    "weight norm": (lambda: normed(parametrizations.weight_norm), X, "graph"),
    "embedding bag": (lambda: nn.EmbeddingBag(5, 2), torch.arange(18).view(N, 3) % 5, ""),
}


each_row = pytest.mark.parametrize("name", list(ROWS))


def built(name):
    torch.manual_seed(0)
    build, x, ways = ROWS[name]
    module = build().double()
    return module, x, ways.split()


def numerical_jacobian(predict, params):
    """The Jacobian of the outputs by central differences: no automatic differentiation."""
    theta = oracles.flatten([p.detach() for p in params])
    step = 1e-5

    def outputs(v):
        with torch.no_grad():
            return predict(oracles.unflatten(v, params)).flatten()

    units = torch.eye(len(theta), dtype=F64) * step
    return torch.stack([(outputs(theta + e) - outputs(theta - e)) / (2 * step) for e in units], 1)


@each_row
def test_each_way_of_differentiating_equals_the_numerical_jacobian_or_says_why_not(name):
    module, x, ways = built(name)
    params = dict(module.named_parameters())

    def predict(p):
        return functional_call(module, dict(zip(params, p, strict=True)), (x,))

    def fn(p, x):
        return td.Normal(functional_call(module, p, (x,)), 0.5)

    J = numerical_jacobian(predict, list(params.values()))
    exact = 4 * J.T @ J / N
    for backend in ("graph", "functional"):
        if backend in ways:
            F = FisherOperator.from_function(fn, params, x, backend=backend)
            # 1e-7: what central differences in float64 can tell
            close(to_dense(F), exact, 1e-7)
            assert F.backend == backend
        else:
            with pytest.raises(RuntimeError, match="torch said"):
                FisherOperator.from_function(fn, params, x, backend=backend) @ torch.ones(
                    len(exact), dtype=F64
                )
    F = FisherOperator.from_function(fn, params, x)
    close(to_dense(F), exact, 1e-7)
    assert F.backend != "functional"
    assert all(p.grad is None for p in module.parameters())


# torch warns of a slow fallback before it raises
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@each_row
def test_vmap_over_stacked_parameters_equals_the_loop(name):
    module, x, ways = built(name)
    params = {k: p.detach() for k, p in module.named_parameters()}
    stacked = {k: torch.stack([p, 0.9 * p, p + 0.1]) for k, p in params.items()}
    V = torch.randn(3, sum(p.numel() for p in params.values()), dtype=F64)

    def product(p, v):
        def fn(p, x):
            return td.Normal(functional_call(module, p, (x,)), 0.5)

        return FisherOperator.from_function(fn, p, x).mv(v)

    if "vmap" not in ways:
        with pytest.raises(RuntimeError, match="torch said"):
            vmap(product)(stacked, V)
        return
    loop = [product({k: p[i] for k, p in stacked.items()}, V[i]) for i in range(3)]
    close(vmap(product)(stacked, V), torch.stack(loop), 1e-12)


class Once(torch.autograd.Function):
    """A square whose derivative autograd takes to have the derivative zero."""

    @staticmethod
    def forward(x):
        return x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class OnceWithForwardMode(Once):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * ctx.saved_tensors[0] * tangent


def test_where_every_way_fails_the_error_names_each():
    def fn(p):
        return td.Normal(Once.apply(p["w"]), 0.5)

    with pytest.raises(RuntimeError, match=r"differentiated twice.*In forward mode: .*jvp"):
        FisherOperator.from_function(fn, {"w": X[0]})
    with pytest.raises(RuntimeError, match="differentiated twice"):
        HessianOperator.from_function(lambda p: Once.apply(p["w"]).sum(), {"w": X[0]})
    w = X[0].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="differentiated twice"):
        GGNOperator(Once.apply(w).sum(), w, [w])


def test_what_cannot_be_differentiated_twice_is_differentiated_in_forward_mode():
    def fn(p):
        return td.Normal(OnceWithForwardMode.apply(p["w"]), 0.5)

    F = FisherOperator.from_function(fn, {"w": X[0]})
    assert F.backend == "functional"
    close(to_dense(F), torch.diag(4 * (2 * X[0]) ** 2 / 3))


# what torch._dynamo and make_fx warn of when they load
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_module_is_differentiated_in_forward_mode():
    torch.manual_seed(0)
    module = torch.compile(mlp().double(), backend="aot_eager")
    params = dict(module.named_parameters())

    def fn(p, x):
        return td.Normal(functional_call(module, p, (x,)), 0.5)

    F = FisherOperator.from_function(fn, params, X)
    plain = module._orig_mod
    J = numerical_jacobian(
        lambda p: functional_call(
            plain, dict(zip(dict(plain.named_parameters()), p, strict=True)), X
        ),
        list(params.values()),
    )
    close(to_dense(F), 4 * J.T @ J / N, 1e-7)
    assert F.backend == "functional"


def test_vmap_over_modules_and_over_data():
    torch.manual_seed(0)
    modules = [mlp().double() for _ in range(3)]
    params, buffers = stack_module_state(modules)
    v = torch.randn(26, dtype=F64)

    def product(p, x):
        def fn(p, x):
            return td.Categorical(logits=functional_call(modules[0], (p, buffers), (x,)))

        return FisherOperator.from_function(fn, p, x).mv(v)

    params = {k: p.detach() for k, p in params.items()}
    one = {k: p[0] for k, p in params.items()}
    over_data = vmap(product, in_dims=(None, 0))(one, torch.stack([X, 2 * X]))
    close(over_data, torch.stack([product(one, X), product(one, 2 * X)]), 1e-12)
    both = vmap(vmap(product, in_dims=(None, 0)), in_dims=(0, None))(
        params, torch.stack([X, 2 * X])
    )
    close(both[0], over_data, 1e-12)
