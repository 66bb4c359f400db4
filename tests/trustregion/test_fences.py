"""Fences of the Jacobian products: what fails falls back, and what is wrong is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, Normal
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import trustregion as tr
from trustregion import autodiff
from trustregion.linearise import GraphLinearisation, TapeLinearisation, choose, linearise, tape
from trustregion.linearise.arithmetic import Elementwise, MatrixProduct
from trustregion.linearise.rules import Rule
from trustregion.operators import ParameterVector, to_dense


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing has been compared yet, as in a new process."""
    monkeypatch.setattr(choose, "_AGREED", set())
    monkeypatch.setattr(autodiff, "_ONLY_LOOK", set())
    torch.manual_seed(0)


def jacobian(outputs, params):
    """Return the dense Jacobian by one backward pass for each row."""
    rows = []
    for y in outputs:
        for entry in y.reshape(-1):
            grads = torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True)
            pairs = zip(grads, params, strict=True)
            parts = [torch.zeros_like(p) if g is None else g for g, p in pairs]
            rows.append(torch.cat([g.reshape(-1) for g in parts]))
    return torch.stack(rows)


def check_products(J, outputs, params, reference=None, tolerance=1e-10):
    """Compare ``J v`` and ``J'u`` with the dense matrix."""
    matrix = jacobian(outputs, params) if reference is None else reference
    v = torch.randn(matrix.shape[1], dtype=matrix.dtype)
    u = [torch.randn_like(y) for y in outputs]
    along = torch.cat([t.reshape(-1) for t in J.jvp(v)])
    torch.testing.assert_close(along, matrix @ v, rtol=tolerance, atol=tolerance)
    back = matrix.T @ torch.cat([x.reshape(-1) for x in u])
    torch.testing.assert_close(J.vjp(u), back, rtol=tolerance, atol=tolerance)


def small():
    x, layer = torch.randn(4, 3).double(), nn.Linear(3, 2).double()
    return layer, lambda: [layer(x).tanh()]


RAISED = [
    TypeError("of a changed signature"), ValueError("not in list"), AttributeError("renamed"),
    RuntimeError("of torch"), KeyError("x"), AssertionError(), IndexError(), ZeroDivisionError(),
]  # fmt: skip


@pytest.mark.parametrize("error", RAISED, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("moment", ["rule", "structure", "jvp", "vjp", "plan"])
def test_whatever_a_rule_raises_the_products_are_right(monkeypatch, error, moment):
    def fail(*_, **__):
        raise error

    if moment == "plan":
        monkeypatch.setattr(tape, "plan", fail)
    else:
        names = {"rule": "__init__", "structure": "case"}
        value = property(fail) if moment == "structure" else fail
        monkeypatch.setattr(Elementwise, names.get(moment, moment), value)
    layer, run = small()
    outputs = run()
    J = linearise(outputs, ParameterVector(layer.parameters()))
    assert isinstance(J, TapeLinearisation if moment == "rule" else GraphLinearisation)
    check_products(J, outputs, list(layer.parameters()))


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
]  # fmt: skip


@pytest.mark.parametrize("error", [*MEMORY, KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("moment", ["__init__", "jvp", "vjp"])
def test_an_exhausted_memory_and_an_interrupt_are_told(monkeypatch, error, moment):
    def fail(*_):
        raise error

    monkeypatch.setattr(Elementwise, moment, fail)
    layer, run = small()
    with pytest.raises(type(error)) as caught:
        linearise(run(), ParameterVector(layer.parameters()))
    assert caught.value is error


def test_the_memory_error_of_torch_itself_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert autodiff.out_of_memory(caught.value)
    assert not autodiff.out_of_memory(RuntimeError("shape mismatch"))


@pytest.mark.parametrize(
    "outputs",
    [
        lambda _: [torch.ones(2)],
        lambda _: [torch.ones(2, requires_grad=True).exp()],
        lambda p: [p.detach() * 2],
    ],
    ids=["constant", "of another parameter", "detached"],
)
@pytest.mark.parametrize("backend", choose.BACKENDS)
def test_wrong_arguments_are_told_by_every_backend(outputs, backend):
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="outputs"):
        linearise(outputs(p), ParameterVector([p]), backend)


def test_a_structure_is_read_by_its_rules(monkeypatch):
    """A graph that agreed by one choice of rules is compared again by another one."""
    layer, run = small()
    outputs, vector = run(), ParameterVector(layer.parameters())
    plain = linearise(outputs, vector)

    class Wrong(MatrixProduct):
        def jvp(self, tangents):
            return super().jvp(tangents).mul_(2)

    monkeypatch.setitem(tape.rule_for.__globals__["_RULES"], "AddmmBackward0", Wrong)
    monkeypatch.setattr("trustregion.linearise.catalogue.MatrixProduct", Wrong)
    other = linearise(outputs, vector)
    assert (plain.backend, other.backend) == ("tape", "graph")
    check_products(other, outputs, list(layer.parameters()))


# Operations whose nodes share a name with a simpler overload, or take tensors as options.

LOW, HIGH = torch.tensor([-0.4, -0.2, 0.1]).double(), torch.tensor([0.5, 0.6, 0.7]).double()
OVERLOADS = {
    "clamp by tensors": lambda x, _: torch.clamp(x, LOW, HIGH),
    "clamp below": lambda x, _: torch.clamp(x, min=LOW),
    "clamp above": lambda x, _: x.clamp(max=HIGH),
    "clamp by numbers": lambda x, _: x.clamp(-0.3, 0.4),
    "clip": lambda x, _: torch.clip(x, LOW, HIGH),
    "clamp in place": lambda x, _: x.clone().clamp_(LOW, HIGH),
    "clamp by scalars": lambda x, _: torch.clamp(x, LOW[0], HIGH[0]),
    "clamp by learned bounds": lambda x, a: torch.clamp(x, a - 0.5, a + 0.1),
    "clamp below a learned bound": lambda x, a: torch.clamp(x, max=a),
    "constant between learned bounds": lambda x, a: torch.clamp(x.detach(), a - 0.5, a + 0.1),
    "bounds that broadcast the input": lambda x, _: x[:1].clamp(LOW.expand(4, 3), HIGH),
    "power of a number": lambda x, _: x.abs() ** 1.5,
    "power of a tensor": lambda x, a: x.abs() ** a,
    "power of a number's base": lambda x, _: 1.5**x,
    "division by a number": lambda x, _: x / 3,
    "division by a tensor": lambda x, a: x / (2 + a),
    "a number less a tensor": lambda x, _: torch.rsub(x, 1.0, alpha=2.0),
    "a tensor less a tensor": lambda x, a: torch.rsub(x, a, alpha=2.0),
    "leaky relu of a learned slope": lambda x, a: torch.prelu(x, a),
    "softplus": lambda x, _: nn.functional.softplus(x, beta=2.0, threshold=0.5),
    "threshold": lambda x, _: nn.functional.threshold(x, 0.1, -1.0),
    "log of another base": lambda x, a: torch.xlogy(a, x.abs()),
    "sum of scaled": lambda x, a: torch.sub(x, a, alpha=3),
    "addcmul": lambda x, a: torch.addcmul(x, x, a, value=0.5),
    "lerp by a tensor": lambda x, a: torch.lerp(x, a, a.sigmoid()),
    "lerp by a number": lambda x, a: torch.lerp(x, a.expand(4, 3), 0.3),
    "where": lambda x, a: torch.where(x > 0, x, a),
    "masked fill by a tensor": lambda x, a: x.masked_fill(x > 0, a[0]),
    "view as another dtype and back": lambda x, a: x.float().double() * a,
}  # fmt: skip


@pytest.mark.parametrize("backend", choose.BACKENDS)
@pytest.mark.parametrize("name", OVERLOADS)
def test_overloads_that_share_a_node(name, backend):
    x, a = (torch.randn(shape).double().requires_grad_() for shape in ((4, 3), (3,)))
    outputs = [OVERLOADS[name](x, a) * 1.5]
    # the cast rounds to single precision
    tolerance = 1e-6 if "dtype" in name else 1e-10
    check_products(
        linearise(outputs, ParameterVector([x, a]), backend), outputs, [x, a], tolerance=tolerance
    )


def test_common_activations_are_one_multiplication_each():
    """The check of the inputs leaves the fast rule to those that it is for."""
    functions = (
        torch.tanh, torch.sigmoid, torch.relu, torch.exp, torch.sin, torch.abs, torch.neg,
        nn.functional.gelu, nn.functional.silu, nn.functional.softplus, nn.functional.elu,
        lambda x: x**2, lambda x: x.clamp(min=0.1), lambda x: x.clamp(0.1, 0.2),
        lambda x: x.clamp_max(0.3), lambda x: x.clamp_min(0.3),
    )  # fmt: skip
    x = torch.rand(3, requires_grad=True)
    J = linearise([f(x) for f in functions], ParameterVector([x]), "tape")
    assert [type(s.rule) for s in J._steps] == [Elementwise] * len(functions)


# Pullbacks that have no derivative at zero.


@pytest.mark.parametrize("backend", choose.BACKENDS)
def test_logcumsumexp(backend):
    net, x = nn.Linear(6, 6).double(), torch.randn(5, 6).double()
    outputs, params = [net(x).logcumsumexp(-1)], list(net.parameters())
    check_products(linearise(outputs, ParameterVector(params), backend), outputs, params)
    matrix = jacobian(outputs, params)
    F = tr.FisherOperator(Normal(outputs[0], 1.0), params, backend=backend)
    torch.testing.assert_close(to_dense(F), matrix.T @ matrix / 5)


def test_logcumsumexp_behind_dead_units():
    """Zero cotangents at the node, which double backward turns into NaN, do not reach the tape."""
    net, x = nn.Linear(6, 6).double(), torch.randn(5, 6).double()
    alive = torch.tensor([1, 1, 0, 1, 0, 1]).double()
    outputs, params = [net(x).logcumsumexp(-1) * alive], list(net.parameters())
    vector = ParameterVector(params)
    assert linearise(outputs, vector).backend == "tape"
    check_products(linearise(outputs, vector), outputs, params)
    with pytest.raises(RuntimeError, match="not finite where the gradient is"):
        linearise(outputs, vector, "graph")


def test_values_that_are_not_finite_are_no_fault_of_the_products():
    p = nn.Parameter(torch.tensor([0.0, 1.0]))
    J = linearise([p.sqrt()], ParameterVector([p]), "graph")
    assert not J.jvp(torch.ones(2))[0].isfinite().all()


# Attention of queries that the mask leaves without a key.


class Attending(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(8, 8, bias=bias) for _ in range(4))

    def forward(self, x, mask):
        def heads(z):
            return z.view(*x.shape[:2], 2, 4).transpose(1, 2)

        q, k, v = (heads(part(x)) for part in self.parts[:3])
        h = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.parts[3](h.transpose(1, 2).flatten(2))[..., :3]


FULL = torch.ones(4, 4, dtype=torch.bool).tril().expand(2, 1, 4, 4).clone()
PADDED = FULL.clone()
PADDED[1, :, :, :2] = False


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("order", [[FULL, PADDED], [PADDED], [PADDED, FULL, PADDED]], ids=len)
@pytest.mark.parametrize("bias", [False, True])
def test_attention_without_a_key(bias, order, kind):
    model, x = Attending(bias).double(), torch.randn(2, 4, 8).double()
    params = list(model.parameters())
    for mask in order:
        given = mask if kind == "bool" else torch.where(mask, 0.0, -torch.inf).double()
        with sdpa_kernel(SDPBackend.MATH):
            reference = jacobian([model(x, given)], params)
        outputs = [model(x, given)]
        J = linearise(outputs, ParameterVector(params))
        assert J.backend == "tape"
        check_products(J, outputs, params, reference)
        F = tr.FisherOperator(Independent(Categorical(logits=outputs[0]), 1), params)
        p = outputs[0].detach().softmax(-1).view(-1, 3)
        metric = torch.block_diag(*(torch.diag_embed(p) - p[:, :, None] * p[:, None]))
        torch.testing.assert_close(to_dense(F), reference.T @ metric @ reference / 2)


def test_a_mask_that_drowns_the_scores_is_compared():
    """The fused kernel's own gradient is wrong there, so that nothing can be compared with it."""
    model, x = Attending(True).double(), torch.randn(2, 4, 8).double()
    vector = ParameterVector(model.parameters())
    lowest = torch.where(PADDED, 0.0, -1e30).double()
    assert linearise([model(x, torch.where(FULL, 0.0, -1e3).double())], vector).backend == "tape"
    with pytest.raises(RuntimeError, match="MATH"):
        linearise([model(x, lowest)], vector)


# Gradient hooks.

CHANGING = {
    "clamp": lambda g: g.clamp(-1, 1),
    "norm clip": lambda g: g / max(1.0, g.norm().item()),
    "clip if large": lambda g: g * 10 / g.norm() if g.norm() > 10 else None,
    "mask": lambda g: g * (torch.arange(g.numel()).view(g.shape) % 2),
    "in place": lambda g: str(g.mul_(0.5)) and None,
}  # fmt: skip
LOOKING = {
    "none": lambda _: None,
    "same": lambda g: g,
    "nan_to_num": lambda g: torch.nan_to_num(g),
    "print": lambda g: str(g.norm()) and None,
}


def classifier():
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(16, 5)
    y = torch.randint(3, (16,))

    def closure():
        d = Categorical(logits=model(x))
        return -d.log_prob(y).mean(), d

    return model, closure


MAKERS = {
    "natural": lambda ps: tr.NaturalTrustRegion(ps, 0.01),
    "newton": lambda ps: tr.NewtonTrustRegion(ps, 0.1),
}


@pytest.mark.parametrize("before", [False, True], ids=["at once", "after a step"])
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", CHANGING)
def test_a_hook_that_changes_gradients_is_refused_whatever_ran_before(name, maker, before):
    model, closure = classifier()
    optimizer = MAKERS[maker](model.parameters())
    if before:
        optimizer.step(closure)
    handles = [p.register_hook(CHANGING[name]) for p in model.parameters()]
    theta = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        with pytest.raises(ValueError, match="gradient hook"):
            optimizer.step(closure)
    assert all(map(torch.equal, theta, model.parameters()))
    for handle in handles:
        handle.remove()
    optimizer.step(closure)
    assert optimizer.info.accepted


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", LOOKING)
def test_a_hook_that_only_looks_changes_nothing(name, maker):
    ends = []
    for hook in (None, LOOKING[name]):
        torch.manual_seed(0)
        model, closure = classifier()
        optimizer = MAKERS[maker](model.parameters())
        for p in model.parameters() if hook else ():
            p.register_hook(hook)
        for _ in range(2):
            optimizer.step(closure)
        ends.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(*ends)


def test_a_hook_is_tried_once():
    seen = []
    p = nn.Parameter(torch.ones(2))
    p.register_hook(lambda g: seen.append(g.norm().item()))
    linearise([p.exp()], ParameterVector([p]))
    seen.clear()  # the trial, and the comparison with autograd, which is made once as well
    for _ in range(3):
        linearise([p.exp()], ParameterVector([p]))
    assert not seen


def test_a_hook_that_guards_against_large_gradients_may_raise():
    def guard(g):
        assert g.norm() < 1e3

    p = nn.Parameter(torch.ones(2))
    p.register_hook(guard)
    assert linearise([p.exp()], ParameterVector([p])).backend == "tape"


def test_hooks_on_the_accumulated_gradient_do_not_run():
    seen = []
    model, closure = classifier()
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(seen.append)
    optimizer = tr.NaturalTrustRegion(model.parameters(), 0.01)
    optimizer.step(closure)
    assert optimizer.info.accepted
    assert not seen


def test_the_pullback_of_a_node_is_recorded_away_from_zero():
    x = torch.randn(3, requires_grad=True)
    (step,) = linearise([x.logcumsumexp(0)], ParameterVector([x]), "tape")._steps
    assert type(step.rule) is Rule
    step.rule.jvp([torch.ones(3)])
    assert all((w == 1).all() for w in step.rule._pullback[0])
