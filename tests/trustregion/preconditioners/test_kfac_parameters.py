"""Which parameters KFAC gives a block, and which a diagonal."""

import copy
import math

import pytest
import torch
from torch import nn

from kfac_models import FAMILIES, Gaussian, each_dtype, factors_of, fisher, mlp, normal
from trustregion import FisherOperator, to_dense
from trustregion.operators import FunctionOperator, check_symmetric
from trustregion.preconditioners.kfac import KFAC
from trustregion.vector import ParameterVector


@each_dtype
def test_state_independent_scales_have_their_exact_curvature(dtype):
    policy = Gaussian(3, 4, 2).to(dtype)
    F = FisherOperator(policy(torch.randn(50, 3, dtype=dtype)), policy.parameters())
    M = KFAC(policy).build(F, 0.5)
    assert (M @ torch.ones(F.shape[0], dtype=dtype))[:2].tolist() == pytest.approx([0.4, 0.4])


class Other(nn.Module):
    """Layers without Kronecker factors around two that have them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.hidden, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.turned = nn.ConvTranspose2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        h = self.norm(torch.tanh(self.hidden(self.embed(tokens))))
        h = self.turned(self.grouped(h[..., None, None])).flatten(1)
        return self.head(h)


def test_other_parameters_get_an_estimate_of_their_diagonal():
    model = Other().double()
    tokens = torch.arange(40) % 5
    F = fisher(model, tokens, FAMILIES["categorical"])
    kfac = KFAC(model, samples=800)
    M = kfac.build(F, 0.1)
    names = [name for name, _ in model.named_parameters()]
    assert sorted(kfac.state["blocks"]) == [
        names.index("hidden.weight"),
        names.index("head.weight"),
    ]
    exact, found = to_dense(F).diagonal(), kfac.state["diagonal"]
    size = 0
    for name, p in model.named_parameters():
        part = slice(size, size + p.numel())
        size += p.numel()
        if name.split(".")[0] in ("hidden", "head"):
            assert not found[part].any()
            continue
        assert exact[part].any()
        noise = 5 * exact.max().item() / math.sqrt(800)  # of a mean of 800 signs
        torch.testing.assert_close(found[part], exact[part], rtol=0, atol=noise)
        e = torch.zeros(F.shape[0], dtype=torch.float64)
        e[part] = 1.0
        torch.testing.assert_close((M @ e)[part], 1 / (found[part] + 0.1))


@pytest.mark.parametrize("sampled", [1, "exact"])
def test_the_order_of_the_parameters_is_that_of_the_operator(sampled):
    policy = Gaussian(3, 4, 2).double()
    params = list(policy.parameters())
    order = [3, 0, 4, 2, 1]
    x = torch.randn(20, 3, dtype=torch.float64)
    vector = ParameterVector([params[i] for i in order])
    M = KFAC(policy, samples=sampled).build(FisherOperator(policy(x), params), 0.1)
    shuffled = KFAC(policy, samples=sampled).build(FisherOperator(policy(x), vector), 0.1)
    v = [torch.randn_like(p) for p in params]
    Mv = ParameterVector(params).unravel(M @ ParameterVector(params).ravel(v))
    expected = vector.ravel([Mv[i] for i in order])
    torch.testing.assert_close(shuffled @ vector.ravel([v[i] for i in order]), expected)


def test_frozen_and_unused_layers_are_left_out():
    model = mlp(3, 4, 4, 2).double()
    spare = nn.Linear(3, 3).double()
    model[0].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    whole = nn.ModuleList([model, spare])
    y = model(torch.randn(20, 3, dtype=torch.float64))
    F = FisherOperator(normal(y), whole.parameters())
    kfac = KFAC(whole, samples="exact")
    M = kfac.build(F, 0.25)
    assert {w: b["bias"] for w, b in kfac.state["blocks"].items()} == {2: 3, 4: None}
    dense = to_dense(M)
    unused = torch.cat([p.new_full((p.numel(),), i) for i, p in enumerate(whole.parameters())])
    for i in (0, 5, 6, 7):
        part = dense[unused == i][:, unused == i]
        torch.testing.assert_close(part, 4 * torch.eye(len(part), dtype=torch.float64))
    first = dense[unused == 1][:, unused == 1]  # a bias alone: a diagonal
    torch.testing.assert_close(first, first.diagonal().diag())
    assert (first.diagonal() < 4).all()


def test_a_weight_that_is_also_used_in_another_way_has_no_factors():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.head = nn.Linear(3, 4, bias=False), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(torch.tanh(self.encode(x)) @ self.encode.weight)

    model = Tied()
    kfac = KFAC(model)
    kfac.build(fisher(model, torch.randn(5, 3)), 0.1)
    assert list(kfac.state["blocks"]) == [1]


def test_a_bias_that_is_also_used_in_another_way_has_a_diagonal():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return torch.tanh(self.layer(x)) + self.layer.bias

    model = Shared()
    kfac = KFAC(model)
    kfac.build(fisher(model, torch.randn(5, 3)), 0.1)
    assert kfac.state["blocks"][0]["bias"] is None
    assert kfac.state["diagonal"][9:].min() > 0


def test_two_modules_with_one_weight_make_one_block():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    kfac = KFAC(model)
    F = fisher(model, torch.randn(5, 3))
    check_symmetric(kfac.build(F, 0.1))
    alone = KFAC(model[0])
    alone.build(F, 0.1)
    assert len(factors_of(kfac)) == 1
    torch.testing.assert_close(factors_of(kfac), factors_of(alone))


def test_layers_are_found_under_autocast():
    model = mlp(3, 8, 8, 2)
    x = torch.randn(50, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    F = FisherOperator(normal(y.float()), model.parameters())
    half, full = KFAC(model), KFAC(model)
    half.build(F, 0.1)
    full.build(fisher(model, x), 0.1)
    for (A, G), (wanted_A, wanted_G) in zip(factors_of(half), factors_of(full), strict=True):
        # bfloat16 has eight bits
        torch.testing.assert_close(A, wanted_A, rtol=0, atol=0.02)
        torch.testing.assert_close(G, wanted_G, rtol=0, atol=0.02 * wanted_G.max().item())


def test_another_set_of_parameters_starts_over():
    model, x = mlp(3, 4, 2), torch.randn(30, 3)
    kfac = KFAC(model, every=10)
    kfac.build(fisher(model, x), 0.1)
    F = FisherOperator(normal(model(x)), list(model.parameters())[2:])
    assert kfac.build(F, 0.1).shape == F.shape
    assert list(kfac.state["blocks"]) == [0]


def test_a_graph_saved_elsewhere_is_read():
    """As torch.autograd.graph.save_on_cpu does it."""
    model, x = mlp(3, 4, 2), torch.randn(10, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy):
        y = model(x)
    v = torch.randn(26)
    there = KFAC(model).build(FisherOperator(normal(y), model.parameters()), 0.1)
    assert torch.equal(there @ v, KFAC(model).build(fisher(model, x), 0.1) @ v)


def test_bad_arguments_are_refused_in_words():
    model = mlp(3, 4, 2)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got list"):
        KFAC(list(model.parameters()))
    with pytest.raises(ValueError, match="no Linear or Conv2d layer"):
        KFAC(nn.LayerNorm(3))
    for options, words in [
        ({"samples": 0}, "samples must be a positive integer"),
        ({"samples": "all"}, "samples must be"),
        ({"every": 0}, "every must be a positive integer"),
        ({"seed": 0.5}, "seed must be an integer and not negative, got 0.5"),
        ({"decay": 1.0}, "decay must be a number from 0 up to but not 1, got 1.0"),
        ({"decay": -0.1}, "decay must be"),
        ({"decay": None}, "decay must be .* NoneType"),
    ]:
        with pytest.raises(ValueError, match=words):
            KFAC(model, **options)
    kfac = KFAC(model)
    F = fisher(model, torch.randn(5, 3))
    for damping in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="damping"):
            kfac.build(F, damping)
    with pytest.raises(TypeError, match="GaussNewtonOperator, got FunctionOperator"):
        kfac.build(FunctionOperator(F.mv, 26), 0.1)


def test_another_module_is_refused_in_words():
    model = mlp(3, 4, 2)
    F = fisher(model, torch.randn(5, 3))
    with pytest.raises(ValueError, match="none of the weights of the module's"):
        KFAC(copy.deepcopy(model)).build(F, 0.1)


@pytest.mark.parametrize("backend", ["auto", "functional"])
def test_an_operator_from_a_function_is_refused_in_words(backend):
    model, x = mlp(3, 4, 2), torch.randn(5, 3)

    def predict(p):
        return normal(torch.func.functional_call(model, p, (x,)))

    F = FisherOperator.from_function(predict, dict(model.named_parameters()), backend=backend)
    with pytest.raises(ValueError, match=r"from_function .*from the outputs of the module"):
        KFAC(model).build(F, 0.1)


def test_a_graph_without_the_layers_is_refused_in_words():
    layer = nn.Linear(3, 2)
    y = (torch.randn(5, 1, 3) * layer.weight).sum(-1) + layer.bias
    F = FisherOperator(normal(y), layer.parameters())
    with pytest.raises(ValueError, match="no product with the weight of a Linear"):
        KFAC(layer).build(F, 0.1)
