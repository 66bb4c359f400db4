"""Models whose graphs, taken together, hold every node that the tape can read."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trustregion.operators import ParameterVector


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


def pieces(x, a, b):
    products = [p * q for p, q in zip((x @ a).split(2, 1), (x @ b).chunk(2, 1), strict=True)]
    scalars = torch.stack([a.sum(), b.prod() * 2, a[1, 2], b[0, 0]])
    return torch.cat(products, 1) + scalars


def views(x, a):
    y = (x @ a).t().reshape(3, 2, 2, 2).permute(2, 0, 3, 1).transpose(-1, 1)
    return y[..., 0].squeeze().unsqueeze(0) - a.view(2, 8)[:1, :2].mean()


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
    "log sum exp": (
        lambda: Of(lambda x, a: x @ a - (x @ a).logsumexp(-1, True) + (x @ a).logsumexp(0), FULL),
        ROWS,
    ),
    "log sum exp over two dimensions": (
        lambda: Of(lambda x, a: (x @ a) * (x @ a).logsumexp((0, -1)), FULL),
        ROWS,
    ),
    **{
        f.__name__: (lambda f=f: nn.Sequential(nn.Linear(4, 4), f(), nn.LazyLinear(2)), ROWS)
        for f in ACTIVATIONS
    },
}


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
