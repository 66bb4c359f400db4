"""The Jacobian products of recorded graphs, against autograd's own, node by node."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from trustregion.linearise import (
    GraphLinearisation,
    TapeLinearisation,
    catalogue,
    choose,
    linearise,
    onednn,
)
from trustregion.linearise.arithmetic import Elementwise, MatrixProduct
from trustregion.linearise.rules import Rule, UnreadableGraph
from trustregion.linearise.shapes import Permute
from trustregion.operators import ParameterVector

DTYPES = [torch.float32, torch.float64]


class Of(nn.Module):
    """A function of the input and of parameters of given shapes."""

    def __init__(self, fn, *shapes):
        super().__init__()
        self.fn = fn
        self.weights = nn.ParameterList([nn.Parameter(torch.rand(shape) + 0.2) for shape in shapes])

    def forward(self, x):
        return self.fn(x, *self.weights)


class Last(nn.Module):
    """The last output of a recurrent network."""

    def __init__(self, kind):
        super().__init__()
        self.cells, self.head = kind(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.cells(x)[0][:, -1])


def heads(x, q, k, v, **options):
    parts = [(x @ w).view(2, 5, 2, 2).transpose(1, 2) for w in (q, k, v)]
    return scaled_dot_product_attention(*parts, **options)


def pieces(x, a, b):
    products = [p * q for p, q in zip((x @ a).split(2, 1), (x @ b).chunk(2, 1), strict=True)]
    scalars = torch.stack([a.sum(), b.prod() * 2, a[1, 2], b[0, 0]])
    return torch.cat(products, 1) + scalars


def views(x, a):
    y = (x @ a).t().reshape(3, 2, 2, 2).permute(2, 0, 3, 1).transpose(-1, 1)
    return y[..., 0].squeeze().unsqueeze(0) - a.view(2, 8)[:1, :2].mean()


def written(x, a):
    y = (x @ a).clone()
    y[0] = a[0]
    return y


ACTIVATIONS = (
    nn.Sigmoid, nn.SiLU, nn.GELU, nn.ELU, nn.Softplus, nn.LeakyReLU, nn.Mish, nn.Hardtanh,
    nn.Hardswish, nn.LogSigmoid, nn.Softsign, nn.SELU, nn.CELU, nn.Tanhshrink,
    nn.Tanh, nn.ReLU, nn.GLU,
)  # fmt: skip
ROWS, IMAGES, SEQUENCES, INDICES = (6, 4), (3, 2, 8, 8), (2, 5, 4), (3, 5)
FULL = (4, 4)
MODELS = {
    "policy": (
        lambda: nn.Sequential(
            nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
        ),
        ROWS,
    ),
    "sequences": (
        lambda: nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 3)),
        SEQUENCES,
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.RMSNorm(8), nn.Linear(8, 3)),
        ROWS,
    ),
    "plain layer norm": (
        lambda: nn.Sequential(
            nn.Linear(4, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 3)
        ),
        ROWS,
    ),
    "layer norm without bias": (
        lambda: nn.Sequential(nn.LayerNorm(4, bias=False), nn.LayerNorm((5, 4))),
        SEQUENCES,
    ),
    "images": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, groups=2, stride=2),
            nn.Flatten(),
            nn.Linear(4, 2),
        ),
        IMAGES,
    ),
    "pooled images": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)
        ),
        IMAGES,
    ),
    "transposed convolution": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1), nn.GELU(), nn.GroupNorm(3, 3)
        ),
        IMAGES,
    ),
    "signals": (
        lambda: nn.Sequential(nn.Conv1d(5, 4, 2), nn.MaxPool1d(2), nn.BatchNorm1d(4)),
        SEQUENCES,
    ),
    "batch norm, frozen": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval(),
        ROWS,
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 4, padding_idx=2), nn.Flatten(), nn.Linear(20, 2)),
        INDICES,
    ),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0),
        SEQUENCES,
    ),
    "lstm": (lambda: Last(nn.LSTM), SEQUENCES),
    "gru": (lambda: Last(nn.GRU), SEQUENCES),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)), ROWS),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), ROWS),
    "orthogonal": (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), ROWS),
    "pieces": (lambda: Of(pieces, FULL, FULL), ROWS),
    "views": (lambda: Of(views, FULL), ROWS),
    "transposed before and after": (
        lambda: Of(lambda x, a, b: ((x @ a).t().tanh() @ x).sin().t() @ b, FULL, FULL),
        ROWS,
    ),
    "transposed in between": (
        lambda: Of(lambda x, a, b: (((x @ a).tanh().t() @ b).exp().t() @ a).sin(), FULL, (6, 6)),
        (6, 4),
    ),
    "transposed and used often": (
        lambda: Of(lambda x, a: (h := (x @ a).tanh()).t() @ (h + (h @ a).sin()).exp(), FULL),
        ROWS,
    ),
    "a transpose used twice": (
        lambda: Of(lambda x, a: (x @ (w := a.t())).tanh() @ w, FULL),
        ROWS,
    ),
    "a constant added": (
        lambda: Of(lambda x, a, b: ((x @ a + x) @ b - x) @ (a - b.detach()), FULL, FULL),
        ROWS,
    ),
    "one number added": (lambda: Of(lambda x, a, b: torch.addmm(b, x, a), FULL, (1,)), ROWS),
    "an alias beside an activation": (
        lambda: Of(lambda x, a, b: (h := x @ a + b).tanh() * (h - 1) + (h + x).sin(), FULL, (4,)),
        ROWS,
    ),
    "a convolution of the bias alone": (
        lambda: Of(
            lambda x, b, c: (
                c.exp().view(4, 1, 1) * nn.functional.conv2d(x, x.new_ones(4, 2, 3, 3), b.exp())
            ),
            (4,),
            (4,),
        ),
        IMAGES,
    ),
    "numbers": (
        lambda: Of(
            lambda x, a, b: (
                (3 - (x @ a) * 2 / b + 1) ** 2 / (b.exp() + 1).sqrt()
                - torch.where(x > 0, a.sum() * x, b)
            ),
            FULL,
            (4,),
        ),
        ROWS,
    ),
    "broadcasting": (
        lambda: Of(lambda x, a, b: a * b + x[:, :1] - a - 2 * b, (1, 4), (6, 1)),
        ROWS,
    ),
    "scaled sums": (
        lambda: Of(
            lambda x, a, b: (
                torch.addmm(b, x, a, alpha=2.0, beta=0.5)
                + torch.add(b, a[0], alpha=3)
                - torch.sub(a[1], b, alpha=2)
            ),
            FULL,
            (4,),
        ),
        ROWS,
    ),
    "a matrix added": (lambda: Of(lambda x, a, b: torch.addmm(b @ a, x, a), FULL, ROWS), ROWS),
    "a bias alone": (lambda: Of(lambda x, a: torch.addmm(a, x, torch.eye(4).to(x)), (4,)), ROWS),
    "batches of matrices": (
        lambda: Of(lambda _, a, b: torch.baddbmm(a, b, a @ b, alpha=2.0), (3, 4, 4), (3, 4, 4)),
        ROWS,
    ),
    "used often": (lambda: Of(lambda x, a: (h := x @ a) * h + h.tanh() @ a.t() + h, FULL), ROWS),
    "tied": (lambda: Of(lambda x, a: ((x @ a).tanh() @ a.t()).tanh() @ a, (4, 5)), ROWS),
    "solve": (
        lambda: Of(
            lambda x, a: torch.linalg.solve(a @ a.t() + torch.eye(4).to(x), x.t()).logsumexp(0),
            FULL,
        ),
        ROWS,
    ),
    "einsum": (lambda: Of(lambda x, a: torch.einsum("ni,ij,nj->n", x, a, x), FULL), ROWS),
    "a parameter itself": (lambda: Of(lambda _, a: a, FULL), ROWS),
    "not all of them": (lambda: Of(lambda x, a, b: x @ a, FULL, (2,)), ROWS),  # noqa: ARG005
    "casts": (lambda: Of(lambda x, a: (x @ a).to(torch.float32).exp().to(x.dtype) * x, FULL), ROWS),
    "in place": (lambda: Of(lambda x, a: (x @ a).mul_(2).add_(1).tanh_(), FULL), ROWS),
    "softmax": (
        lambda: Of(lambda x, a: (x @ a).softmax(-1) * x + (x @ a).log_softmax(0), FULL),
        ROWS,
    ),
    **{
        f.__name__: (lambda f=f: nn.Sequential(nn.Linear(4, 4), f(), nn.LazyLinear(2)), ROWS)
        for f in ACTIVATIONS
    },
}
each_model = pytest.mark.parametrize("name", MODELS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def run(name, dtype, seed=0):
    """A model's outputs with their graph, and its parameters."""
    torch.manual_seed(seed)
    make, shape = MODELS[name]
    model = make()
    x = torch.arange(15).view(shape) % 7 if shape == INDICES else torch.randn(shape)
    if any(isinstance(m, nn.LazyLinear) for m in model.modules()):
        model(x)
    model, x = model.to(dtype), x if shape == INDICES else x.to(dtype)
    with sdpa_kernel(SDPBackend.MATH):
        y = model(x)
    return (y,), ParameterVector(model.parameters())


def draw(outputs, vector, seed=1):
    torch.manual_seed(seed)
    return torch.randn(vector.numel, dtype=vector.dtype), [torch.randn_like(y) for y in outputs]


def check_equal(J, reference, dtype):
    """The products are those of the reference, and stay so, whatever was computed in between."""
    rounding = (
        {"rtol": 1e-9, "atol": 1e-11} if dtype is torch.float64 else {"rtol": 2e-3, "atol": 2e-4}
    )
    v, u = draw(J.outputs, J.vector)
    for _ in range(2):
        for t, expected in zip(J.jvp(v), reference.jvp(v), strict=True):
            torch.testing.assert_close(t, expected, **rounding)
        torch.testing.assert_close(J.vjp(u), reference.vjp(u), **rounding)
        J.jvp(-v), J.vjp([2 * x for x in u])
    assert J.used == reference.used


@each_dtype
@each_model
def test_the_tape_equals_double_backward(name, dtype):
    outputs, vector = run(name, dtype)
    J = linearise(outputs, vector)
    assert J.backend == "tape"
    check_equal(J, GraphLinearisation(outputs, vector), dtype)


@each_model
def test_products_alternate_without_disturbing_each_other(name):
    """u'(Jv) = (J'u)'v with both sides held while the other is computed."""
    outputs, vector = run(name, torch.float64)
    J = TapeLinearisation(outputs, vector)
    v, u = draw(outputs, vector)
    tangents = J.jvp(v)
    gradient = J.vjp(u)
    pairing = sum((x * t).sum() for x, t in zip(u, tangents, strict=True))
    rounding = 1e-6 if name == "casts" else 1e-9  # it computes in float32
    torch.testing.assert_close(pairing, gradient @ v, rtol=rounding, atol=rounding)
    kept = gradient.clone()
    J.vjp(tangents)
    assert torch.equal(gradient, kept)


def test_several_outputs_of_one_graph():
    """Some within others, one twice, one a parameter, one without a graph."""
    (y,), vector = run("policy", torch.float64)
    outputs = (y, y.exp(), y[:, 0], y, vector.params[1], torch.ones(3, dtype=torch.float64))
    J, reference = TapeLinearisation(outputs, vector), GraphLinearisation(outputs, vector)
    check_equal(J, reference, torch.float64)
    assert torch.equal(
        J.jvp(torch.ones(vector.numel, dtype=torch.float64))[-1], torch.zeros(3).double()
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.ones(5, 5).tril().bool()}],
    ids=str,
)
def test_fused_attention_is_linearised_where_torch_cannot(options):
    """The products of the fused kernel equal those of the plain one."""
    torch.manual_seed(0)
    model, x = Of(heads, FULL, FULL, FULL).double(), torch.randn(SEQUENCES).double()
    model.fn = lambda x, *w: heads(x, *w, **options)
    vector = ParameterVector(model.parameters())
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        J = linearise([model(x)], vector)
    with sdpa_kernel(SDPBackend.MATH):
        reference = GraphLinearisation([model(x)], vector)
    assert "Flash" in " ".join(s.rule.site.node.name() for s in J._steps)
    check_equal(J, reference, torch.float64)


def test_attention_with_one_trainable_factor():
    torch.manual_seed(0)
    x = torch.randn(SEQUENCES).double()
    for i in range(3):
        weights = [torch.randn(4, 4).double().requires_grad_(i == j) for j in range(3)]
        vector = ParameterVector([weights[i]])
        fused = linearise([heads(x, *weights)], vector)
        with sdpa_kernel(SDPBackend.MATH):
            check_equal(fused, GraphLinearisation([heads(x, *weights)], vector), torch.float64)


def test_a_layer_norm_of_which_only_the_bias_is_trained():
    """Against the formula: torch's second derivative of this layer is wrong here."""
    torch.manual_seed(0)
    x, b, c = torch.randn(ROWS).double(), torch.randn(4).double(), torch.randn(4).double()
    vector = ParameterVector([b.requires_grad_(), c.requires_grad_()])
    y = c.exp() * nn.functional.layer_norm(x, (4,), None, b.exp())
    normal = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    reference = GraphLinearisation([c.exp() * (normal + b.exp())], vector)
    check_equal(linearise([y], vector), reference, torch.float64)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding", [None, 2])
def test_bags_are_linearised_where_torch_cannot(mode, padding):
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(7, 4, mode=mode, padding_idx=padding).double()
    indices = torch.randint(7, INDICES)
    vector = ParameterVector(bag.parameters())
    J = linearise([bag(indices).exp()], vector)
    kept = (indices != padding).unsqueeze(-1) if padding is not None else torch.ones(3, 5, 1)
    sums = (bag.weight[indices] * kept).sum(1)
    plain = sums if mode == "sum" else sums / kept.sum(1)
    check_equal(J, GraphLinearisation([plain.exp()], vector), torch.float64)


@pytest.mark.parametrize("options", [{"mode": "max"}, {"mode": "sum", "weighted": True}], ids=str)
def test_bags_that_cannot_be_linearised_say_so(options):
    bag = nn.EmbeddingBag(7, 4, mode=options["mode"])
    weights = torch.rand(INDICES, requires_grad=True) if "weighted" in options else None
    y = bag(torch.randint(7, INDICES), per_sample_weights=weights)
    params = [bag.weight] if weights is None else [bag.weight, weights]
    with pytest.raises(RuntimeError, match="EmbeddingBag"):
        linearise([y], ParameterVector(params), "tape")


class Sine(torch.autograd.Function):
    """A function whose gradient is Python code."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize(
    "fn", [lambda x, a: Sine.apply(x @ a), written], ids=["python", "copy slices"]
)
def test_what_the_tape_cannot_read_is_left_to_autograd(fn):
    torch.manual_seed(0)
    model = Of(fn, FULL).double()
    vector = ParameterVector(model.parameters())
    outputs = [model(torch.randn(ROWS).double())]
    with pytest.raises(UnreadableGraph, match='use backend="graph"'):
        linearise(outputs, vector, "tape")
    assert linearise(outputs, vector).backend == "graph"


def test_unreadable_nodes_that_no_parameter_reaches_do_not_matter():
    x = torch.randn(ROWS, requires_grad=True)
    W = torch.randn(FULL, requires_grad=True)
    assert linearise([Sine.apply(x) @ W], ParameterVector([W])).backend == "tape"


def test_a_hook_that_changes_gradients_is_noticed():
    """The sweep runs no hooks; where they matter autograd is asked."""
    choose._AGREED.clear()
    W = torch.randn(FULL, requires_grad=True)
    y = torch.randn(ROWS) @ W
    y.register_hook(lambda grad: 2 * grad)
    assert linearise([y.tanh()], ParameterVector([W])).backend == "graph"


def test_checkpointed_layers():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).double()
    y = checkpoint(lambda x: layer(x).tanh(), torch.randn(ROWS).double(), use_reentrant=False)
    vector = ParameterVector(layer.parameters())
    check_equal(linearise([y], vector), GraphLinearisation([y], vector), torch.float64)


def test_autocast():
    """In bfloat16 the sweep rounds where autograd does; 2^-8 is its precision."""
    torch.manual_seed(0)
    model, x = MODELS["policy"][0](), torch.randn(ROWS)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    vector = ParameterVector(model.parameters())
    J, reference = linearise([y.float()], vector), GraphLinearisation([y.float()], vector)
    assert J.backend == "tape"
    v, u = draw(J.outputs, vector)
    torch.testing.assert_close(J.jvp(v)[0], reference.jvp(v)[0], rtol=0.05, atol=0.05)
    torch.testing.assert_close(J.vjp(u), reference.vjp(u), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backend", ["tape", "auto"])
def test_a_freed_graph(backend):
    (y,), vector = run("policy", torch.float32)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="already freed"):
        linearise([y], vector, backend)


@pytest.mark.parametrize("backend", ["tape", "graph"])
def test_parameters_that_moved_are_noticed(backend):
    (y,), vector = run("policy", torch.float32)
    J = linearise([y], vector, backend)
    v, u = draw(J.outputs, vector)
    J.jvp(v)
    with torch.no_grad():
        vector.params[2].mul_(2)
    with pytest.raises(RuntimeError, match="modified in place"):
        J.jvp(v)
    with pytest.raises(RuntimeError, match="modified in place"):
        J.vjp(u)
    with pytest.raises(RuntimeError, match="modified in place"):
        linearise([y], vector, backend)


def test_an_unknown_backend():
    outputs, vector = run("policy", torch.float32)
    with pytest.raises(ValueError, match="auto, tape, graph, got 'fast'"):
        linearise(outputs, vector, "fast")


class Ops(TorchDispatchMode):
    """Counts what torch is asked to compute."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_a_product_costs_four_matrix_products_a_layer_and_nothing_else_of_size(monkeypatch):
    """Two for the first layer, which has no tangent and no cotangent of its input."""
    monkeypatch.setattr(onednn, "fits", lambda _: False)
    outputs, vector = run("policy", torch.float64)
    J = linearise(outputs, vector)
    v, u = draw(outputs, vector)
    with Ops() as ops:
        J.jvp(v)
    assert ops.calls == {"copy_": 1, "addmm": 3, "addmm_": 2, "mul_": 2}
    with Ops() as ops:
        J.vjp(u)
    views = ("t", "transpose", "alias", "detach", "view")
    calls = {name: count for name, count in ops.calls.items() if name not in views}
    assert calls == {"mm": 5, "sum": 3, "mul_": 2, "clone": 1}


@pytest.mark.parametrize("name", ["policy", "images"])
def test_a_sweep_that_ends_early_leaves_zeros(name):
    """A node may answer that an input does not matter; what was there before is not the answer."""
    outputs, vector = run(name, torch.float64)
    J = linearise(outputs, vector)
    _, u = draw(outputs, vector)
    assert all(bool(part.any()) for part in vector.unravel(J.vjp(u)))
    relu = next(s for s in J._steps if s.rule.site.node.name() == "ReluBackward0")
    relu.rule.vjp = lambda _: [None]
    parts = vector.unravel(J.vjp(u))
    assert [bool(part.any()) for part in parts] == [
        i >= (2 if name == "images" else 4) for i in range(6)
    ]


def test_what_is_in_flight_shares_memory():
    """A deep network of one width needs a few buffers of activations, not one a layer."""
    torch.manual_seed(0)
    depth = 12
    model = nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(4, 4), nn.Tanh())])
    J = TapeLinearisation([model(torch.randn(6, 4))], ParameterVector(model.parameters()))
    written = [s.rule.tangent for s in J._steps if s.rule.tangent is not None]
    given = [c for s in J._steps for c in s.rule.cotangents if c is not None and c.shape == (6, 4)]
    assert len(written) == depth
    over = [s.rule.over for s in J._steps if isinstance(s.rule, Elementwise)]
    assert over == [[True, True]] * (depth - 1) + [[True, False]]  # not over what the caller gave
    assert len({t.data_ptr() for t in written + given}) <= 3


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)
@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # said by torch's own context manager
@pytest.mark.parametrize("bias", [True, False])
def test_products_by_onednn_are_those_of_torch(monkeypatch, bias):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(40, 64, bias=bias),
        nn.Tanh(),
        nn.Linear(64, 48, bias=bias),
        nn.Tanh(),
        nn.Linear(48, 3, bias=bias),
    )
    x, vector = torch.randn(700, 40), ParameterVector(model.parameters())
    monkeypatch.setattr(onednn, "_preferred", True)
    J = linearise([model(x)], vector, "tape")
    kinds = [type(s.rule) for s in J._steps]
    assert kinds.count(onednn.DenseProduct) == 2
    assert kinds.count(MatrixProduct) == 1  # too small to be worth a call
    check_equal(J, GraphLinearisation([model(x)], vector), torch.float32)
    with torch.backends.mkldnn.flags(enabled=False):
        plain = linearise([model(x)], vector, "tape")
    assert onednn.DenseProduct not in [type(s.rule) for s in plain._steps]


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)
def test_new_tensors_are_written_over_only_where_nothing_else_needs_them(monkeypatch):
    """Activations after such a product, in chains, used twice, as an output, and through a view."""
    monkeypatch.setattr(onednn, "_preferred", True)
    torch.manual_seed(0)
    a, b = (torch.randn(64, 64).div(8).requires_grad_() for _ in range(2))
    x = torch.randn(400, 64)
    h = (x @ a).tanh().exp()
    z = h @ b
    y = z @ a  # of which a view, a shifted copy and a sum are alive when it is activated
    both = y.tanh() + y.t().sin().t() + (y - 1).exp() * y.sigmoid() + (y + x)
    outputs = [z.tanh() + z.sigmoid(), z, (h @ a).t().tanh(), (z @ a).exp().neg(), h, both]
    vector = ParameterVector([a, b])
    J = linearise(outputs, vector, "tape")
    assert any(any(s.rule.over) for s in J._steps)
    check_equal(J, GraphLinearisation(outputs, vector), torch.float32)


def test_onednn_takes_any_factor_and_leaves_other_sums_alone(monkeypatch):
    monkeypatch.setattr(onednn, "_preferred", torch.backends.mkldnn.is_available())
    torch.manual_seed(0)
    A, B, c, C = torch.randn(700, 40), torch.randn(40, 64), torch.randn(64), torch.randn(700, 64)
    for scales, added in (({}, c), ({}, C), ({"alpha": 2.0}, c), ({"beta": 2.0}, c)):
        for which in ([A], [B], [A, B], [A, B, added], [added, B]):
            for t in (A, B, c, C):
                t.requires_grad_(any(t is w for w in which))
            vector = ParameterVector(which)
            y = torch.addmm(added, A, B, **scales)
            J = linearise([y], vector, "tape")
            fast = any(isinstance(s.rule, onednn.DenseProduct) for s in J._steps)
            assert fast == (not scales and (added is c or not C.requires_grad))
            check_equal(J, GraphLinearisation([y], vector), torch.float32)


@pytest.mark.parametrize(
    ("rule", "method"),
    [
        (Elementwise, "jvp"),
        (Elementwise, "vjp"),
        (MatrixProduct, "jvp"),
        (Permute, "vjp"),
        (Rule, "vjp"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_wrong_rule_is_noticed(monkeypatch, rule, method):
    """The comparison with autograd finds any rule out, in either direction."""
    choose._AGREED.clear()
    right = getattr(rule, method)

    def wrong(self, given):
        out = right(self, given)
        return (
            1.01 * out
            if isinstance(out, torch.Tensor)
            else [g if g is None else 1.01 * g for g in out]
        )

    name = {Permute: "views", Rule: "solve"}.get(rule, "policy")
    outputs, vector = run(name, torch.float64)
    monkeypatch.setattr(rule, method, wrong)
    J = linearise(outputs, vector)
    assert J.backend == "graph"
    monkeypatch.undo()
    assert linearise(outputs, vector).backend == "tape"


def test_a_structure_is_compared_once(monkeypatch):
    choose._AGREED.clear()
    calls = []
    right = choose.disagreement
    monkeypatch.setattr(choose, "disagreement", lambda J: calls.append(J) or right(J))
    for name, expected in [("policy", 1), ("policy", 1), ("tied", 2), ("policy", 2)]:
        assert linearise(*run(name, torch.float64, seed=len(calls))).backend == "tape"
        assert len(calls) == expected


def test_values_that_are_not_finite_are_left_to_autograd():
    choose._AGREED.clear()
    W = torch.full(FULL, torch.inf, requires_grad=True)
    assert (
        linearise([torch.randn(ROWS) @ (W * 2).exp().log()], ParameterVector([W])).backend
        == "graph"
    )


def test_nothing_of_the_caller_is_touched():
    outputs, vector = run("policy", torch.float64)
    v, u = draw(outputs, vector)
    kept_v, kept_u = v.clone(), [x.clone() for x in u]
    state = torch.random.get_rng_state()
    J = linearise(outputs, vector)
    J.jvp(v), J.vjp(u)
    assert torch.equal(v, kept_v)
    assert all(torch.equal(x, kept) for x, kept in zip(u, kept_u, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in vector.params)
    assert not J.vjp(u).requires_grad


def test_complex_numbers_are_left_to_autograd_whatever_was_asked_before():
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    factors = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128)
    y = torch.view_as_real(torch.view_as_complex(w.view(2, 2)) * factors)
    with pytest.raises(UnreadableGraph, match="complex"):
        linearise([y], ParameterVector([w]), "tape")
    assert linearise([y], ParameterVector([w])).backend == "graph"


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_number_that_changes_the_gradient_is_seen(kind):
    """Counting frequencies makes the gradient another one than that of the function."""
    indices = torch.tensor([[0, 1, 1], [2, 2, 2]])
    plain, scaled = kind(4, 3), kind(4, 3, scale_grad_by_freq=True)
    vectors = [ParameterVector(table.parameters()) for table in (plain, scaled)]
    assert linearise([plain(indices).exp()], vectors[0]).backend == "tape"
    with pytest.raises(UnreadableGraph, match="scale_grad_by_freq"):
        linearise([scaled(indices).exp()], vectors[1], "tape")


def test_the_structure_of_a_graph_knows_its_numbers():
    x, a = torch.randn(ROWS), torch.randn(FULL, requires_grad=True)
    outputs = [torch.add(x, x @ a, alpha=alpha) for alpha in (2, 2, 3)]
    first, same, other = (TapeLinearisation([y], ParameterVector([a])).structure for y in outputs)
    assert first == same != other


def test_bags_whose_last_offset_is_the_end():
    torch.manual_seed(0)
    table, indices = torch.randn(7, 3).double().requires_grad_(), torch.tensor([1, 2, 4, 5])
    y = nn.functional.embedding_bag(
        indices, table, torch.tensor([0, 3, 4]), include_last_offset=True, mode="sum"
    )
    plain = torch.stack([table[[1, 2, 4]].sum(0), table[5]])
    vector = ParameterVector([table])
    J = linearise([y.exp()], vector)
    check_equal(J, GraphLinearisation([plain.exp()], vector), torch.float64)


def test_a_row_that_is_one_number():
    """Its memory ends after one number; the fast product reads a row as contiguous."""
    torch.manual_seed(0)
    W, b = torch.randn(128, 64).requires_grad_(), torch.randn(()).requires_grad_()
    x = torch.randn(300, 64)
    for row in (b.expand(128), b.expand(1), torch.stack([b] * 256)[::2]):
        vector = ParameterVector([W, b])
        y = nn.functional.linear(x, W, row)
        check_equal(linearise([y], vector, "tape"), GraphLinearisation([y], vector), torch.float32)


def test_parameters_that_were_computed_are_left_to_autograd():
    base = torch.randn(4, 4).double().requires_grad_()
    w, b = base * 2, torch.zeros(4).double().requires_grad_()
    vector = ParameterVector([w, b])
    J = linearise([torch.randn(ROWS).double() @ w + b], vector)
    assert (J.backend, J.used) == ("graph", (0, 1))


@pytest.mark.parametrize("name", ["EmbeddingBackward0", "ExpBackward0"])
def test_a_wrong_rule_is_noticed_in_small_components_and_large_vectors(monkeypatch, name):
    """One rule dead in a vector of 64,000, one in a part 1e5 times smaller than the rest."""
    choose._AGREED.clear()
    torch.manual_seed(1)
    right = catalogue._RULES[name]

    class Wrong(right):
        def jvp(self, tangents):
            return super().jvp(tangents).zero_()

    monkeypatch.setitem(catalogue._RULES, name, Wrong)
    table, head = nn.Embedding(1000, 64).double(), nn.Linear(64, 4).double()
    scale = nn.Parameter(torch.full((4,), -5.0).double())
    mean = head(table(torch.randint(1000, (256,)))) * 100
    outputs = [mean, scale.exp().expand_as(mean)]
    vector = ParameterVector([*table.parameters(), *head.parameters(), scale])
    assert linearise(outputs, vector).backend == "graph"


@pytest.mark.parametrize("backend", ["auto", "tape", "graph"])
def test_reentrant_checkpoints_are_refused(backend):
    """Autograd itself does not see what is behind them."""
    inner, outer = nn.Linear(4, 4), nn.Linear(4, 2)
    x = torch.randn(ROWS, requires_grad=True)
    y = outer(checkpoint(inner, x, use_reentrant=True))
    vector = ParameterVector([*inner.parameters(), *outer.parameters()])
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        linearise([y], vector, backend)


class Detached(torch.autograd.Function):
    """A backward pass without a derivative of its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return grad.detach() * 3 * ctx.x**2 + 0 * grad


def test_a_backward_pass_that_cannot_be_differentiated_is_refused():
    w = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        linearise([Detached.apply(w)], ParameterVector([w]))


@pytest.mark.parametrize("backend", ["tape", "graph"])
def test_moving_the_parameters_of_a_linear_model_is_noticed_too(backend):
    model = nn.Linear(4, 2)
    J = linearise([model(torch.randn(ROWS))], ParameterVector(model.parameters()), backend)
    with torch.no_grad():
        model.weight.mul_(2)
    with pytest.raises(RuntimeError, match="Build the operator anew"):
        J.jvp(torch.ones(10))


def test_errors_of_the_tape_are_in_words():
    (y,), vector = run("solve", torch.float64)
    J = linearise([y], vector, "tape")
    with pytest.raises(ValueError, match=r"shape \(16,\), got \(1,\)"):
        J.jvp(torch.ones(1, dtype=torch.float64))
    with pytest.raises(RuntimeError, match='backend="graph"'):
        torch.func.vmap(lambda v: J.jvp(v)[0])(torch.ones(2, 16, dtype=torch.float64))
    _, u = draw([y], vector)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="already freed"):
        J.vjp(u)


def test_outputs_of_inference_mode_are_refused_in_words():
    model = nn.Linear(4, 2)
    with torch.inference_mode():
        y = model(torch.randn(ROWS))
    with pytest.raises(ValueError, match="inference_mode"):
        linearise([y], ParameterVector(model.parameters()))
