"""What a product of the tape costs, in operations and memory, and how its rules are verified."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from recorded_models import (
    FULL,
    ROWS,
    check_equal,
    draw,
    run,
)
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
