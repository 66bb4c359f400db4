"""The Jacobian products of recorded graphs, against autograd's own, node by node."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from recorded_models import (
    FULL,
    INDICES,
    MODELS,
    ROWS,
    SEQUENCES,
    Of,
    check_equal,
    draw,
    run,
)
from trustregion.linearise import (
    GraphLinearisation,
    TapeLinearisation,
    linearise,
)
from trustregion.operators import ParameterVector

DTYPES = [torch.float32, torch.float64]


def heads(x, q, k, v, **options):
    parts = [(x @ w).view(2, 5, 2, 2).transpose(1, 2) for w in (q, k, v)]
    return scaled_dot_product_attention(*parts, **options)


each_model = pytest.mark.parametrize("name", MODELS)


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


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
