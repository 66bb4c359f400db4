"""Laws of the root of the Fisher matrix."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as td

from cases import cases
from root_cases import check_root, each_dtype
from trustregion import Family, FisherOperator, Identity, Status, to_dense
from trustregion.distributions import registry as module
from trustregion.linearise import TapeLinearisation
from trustregion.operators.root import FisherRoot
from trustregion.solvers.cg import cg
from trustregion.solvers.least_squares import lsqr

CASES = {case.name: case for case in cases()}


each_case = pytest.mark.parametrize("name", list(CASES))


def fisher(name, dtype):
    case = next(c for c in cases(dtype) if c.name == name)
    return FisherOperator(case.predict(case.params), case.params)


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


@each_dtype
@each_case
def test_the_root_times_its_transpose_is_the_fisher(name, dtype):
    F = fisher(name, dtype)
    R = check_root(F)
    assert isinstance(R, FisherRoot)
    v = torch.randn(F.shape[0], dtype=dtype)
    size = (F @ v).abs().max().item()
    torch.testing.assert_close(
        R.rmv(R.mv(v)), F @ v, rtol=0, atol=50 * torch.finfo(dtype).eps * size
    )


@each_dtype
@each_case
def test_rows_belong_to_their_sample(name, dtype):
    """Sample by sample the rows give that sample's share of the Fisher matrix."""
    F = fisher(name, dtype)
    rows = F.root().rows().double().view(F.batch_size, -1, F.shape[0])
    case, J = CASES[name], fisher(name, torch.float64).jacobian.rows()
    outputs = FisherOperator(case.predict(case.params), case.params)
    which = flat(
        torch.arange(F.batch_size).view(-1, *[1] * (y.ndim - 1)).expand(y.shape)
        for y in outputs.outputs
    )
    metric = torch.stack([outputs.metric(e) for e in torch.eye(len(J), dtype=torch.float64)])
    for i in range(F.batch_size):
        mine = which == i
        share = J[mine].T @ metric[mine][:, mine] @ J[mine] / F.batch_size
        atol = 50 * torch.finfo(dtype).eps * share.abs().max().item()
        torch.testing.assert_close(rows[i].T @ rows[i], share, rtol=0, atol=atol)


@each_dtype
@each_case
def test_a_lifted_derivative_gives_the_gradient(name, dtype):
    F = fisher(name, dtype)
    R, J = F.root(), F.jacobian
    u = F.metric(torch.randn(J.shape[0], dtype=dtype))  # in the range of M
    g = J.rmv(u)
    y = R.lift(u)
    assert (y.shape, y.dtype) == ((R.shape[0],), dtype)
    # the smallest eigenvalues of a block times the rounding of u in their direction
    atol = 300 * torch.finfo(dtype).eps * g.abs().max().item()
    torch.testing.assert_close(R.rmv(y), g, rtol=0, atol=atol)


def softmax_regression(dtype, *, seed=0, samples=60, features=10, actions=4, log_condition=1.0):
    """Softmax regression with its cross-entropy: the operator, u, and the gradient."""
    g = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=g, dtype=torch.float64)
    Q, _ = torch.linalg.qr(draw(features, features))
    grades = torch.logspace(0, -log_condition, features, dtype=torch.float64)
    x = (draw(samples, features) * grades @ Q).float().to(dtype)
    W = draw(features, actions).float().to(dtype).requires_grad_()
    targets = torch.randint(0, actions, (samples,), generator=g)
    d = td.Categorical(logits=x @ W)
    logits = d.logits.detach().requires_grad_()
    (u,) = torch.autograd.grad(-td.Categorical(logits=logits).log_prob(targets).mean(), logits)
    loss = -d.log_prob(targets).mean()
    (gradient,) = torch.autograd.grad(loss, W, retain_graph=True)
    return FisherOperator(d, [W]), u.flatten(), gradient.flatten()


def gaussian(dtype, *, seed=0, samples=60, features=6, log_condition=1.0):
    """A Gaussian with a mean and a scale of each input, with its negative log-likelihood."""
    g = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=g, dtype=torch.float64)
    Q, _ = torch.linalg.qr(draw(features, features))
    grades = torch.logspace(0, -log_condition, features, dtype=torch.float64)
    x = (draw(samples, features) * grades @ Q).float().to(dtype)
    W = draw(features, 4).float().to(dtype).requires_grad_()
    out = x @ W
    d = td.Independent(td.Normal(out[:, :2], out[:, 2:].exp()), 1)
    base = d.base_dist
    loss = -d.log_prob(draw(samples, 2).to(dtype)).mean()
    u = flat(torch.autograd.grad(loss, [base.loc, base.scale], retain_graph=True))
    (gradient,) = torch.autograd.grad(loss, W, retain_graph=True)
    return FisherOperator(d, [W]), u, gradient.flatten()


MODELS = pytest.mark.parametrize("model", [softmax_regression, gaussian])


@each_dtype
@MODELS
@pytest.mark.parametrize("seed", range(3))
def test_lifted_losses_give_their_gradient(model, seed, dtype):
    F, u, g = model(dtype, seed=seed)
    R = F.root()
    size = u.abs().max().item() * F.batch_size
    atol = 5 * torch.finfo(dtype).eps * size  # of a sum over the batch
    torch.testing.assert_close(R.rmv(R.lift(u)), g, rtol=0, atol=atol)


def test_a_part_outside_the_range_is_dropped():
    """As documented: a shift of all logits' derivatives has no meaning for the root."""
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    R = FisherOperator(td.Categorical(logits=logits), [logits]).root()
    y = R.lift(torch.randn(15, dtype=torch.float64))
    assert y.isfinite().all()
    y = y.view(5, 3)
    assert torch.equal(y == 0, torch.tensor([[True, False, False]]).expand(5, 3))
    p = torch.softmax(logits.detach(), -1)
    p.sub_(torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 0, 1]), 3)).div_(5)
    torch.testing.assert_close(R.rmv(R.lift(p.flatten())), p.flatten(), rtol=1e-10, atol=1e-14)


@MODELS
@pytest.mark.parametrize("damping", [1e-1, 1e-4])
def test_least_squares_on_the_root_is_the_damped_natural_gradient(model, damping):
    F, u, g = model(torch.float64)
    R = F.root()
    solution = lsqr(R, R.lift(u), damping=damping, rtol=1e-12)
    assert solution.status is Status.CONVERGED
    A = to_dense(F) + damping * torch.eye(F.shape[0], dtype=torch.float64)
    exact = torch.linalg.solve(A, g)
    # the tolerance, times the condition of A
    torch.testing.assert_close(solution.x, exact, rtol=0, atol=1e-7 * exact.abs().max().item())


def errors(model, seed, *, lifted, **options):
    """Relative errors in float32 of lsqr on the root and of cg, damped by 1e-6 of the largest."""
    F, u, g = model(torch.float32, seed=seed, **options)
    F64, _, g64 = model(torch.float64, seed=seed, **options)
    R = F.root()
    y = R.lift(u)
    if not lifted:
        x = torch.randn(F.shape[0], generator=torch.Generator().manual_seed(seed))
        y, g, g64 = R.mv(x), F @ x, F64 @ x.double()
    dense = to_dense(F64)
    damping = 1e-6 * torch.linalg.eigvalsh(dense)[-1].item()
    exact = torch.linalg.solve(dense + damping * torch.eye(len(dense), dtype=torch.float64), g64)
    ours = lsqr(R, y, damping=damping, rtol=1e-9, max_iter=2000)
    theirs = cg(F + damping * Identity(F.shape[0]), g, rtol=1e-9, max_iter=2000)
    assert ours.iterations <= theirs.iterations
    return [((s.x.double() - exact).norm() / exact.norm()).item() for s in (ours, theirs)]


@MODELS
@pytest.mark.parametrize("seed", range(3))
def test_far_more_accurate_than_cg_in_float32_where_the_target_is_in_reach(model, seed):
    ours, theirs = errors(model, seed, lifted=False, log_condition=2.0)
    assert 10 * ours < theirs  # 27 to 2e4 measured
    assert ours < 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_far_more_accurate_than_cg_in_float32_on_a_singular_fisher(seed):
    """A shift of all logits is in the null space, and cg has its rounding over the damping."""
    ours, theirs = errors(softmax_regression, seed, lifted=True)
    assert 50 * ours < theirs  # 330 to 1000 measured
    assert ours < 1e-4


@each_dtype
@given(st.integers(-100, 100), st.integers(0, 2**31))
def test_scaling_the_outputs_by_powers_of_two_is_exact(dtype, power, seed):
    g = torch.Generator().manual_seed(seed)
    mean = torch.zeros(4, 2, dtype=dtype, requires_grad=True)
    tril = torch.randn(4, 2, 2, generator=g, dtype=torch.float64).tril().to(dtype)
    tril.diagonal(dim1=1, dim2=2).abs_().add_(0.1)
    factor = 2.0**power

    def root(scale):
        d = td.MultivariateNormal(mean, scale_tril=tril * scale, validate_args=False)
        return FisherOperator(d, [mean]).root()

    v = torch.randn(8, generator=g).to(dtype)
    assert torch.equal(root(factor).mv(v * factor), root(1.0).mv(v))


def counting(monkeypatch):
    counts = {"metric": 0, "jvp": 0, "vjp": 0}
    family = module._FAMILIES[td.Categorical]

    def fisher(params):
        M = family.fisher(params)

        def apply(d):
            counts["metric"] += 1
            return M(d)

        return apply

    known = dict(module._FAMILIES)
    known[td.Categorical] = Family(family.parameters, family.kl, fisher)
    monkeypatch.setattr(module, "_FAMILIES", known)
    for name in ("jvp", "vjp"):
        product = getattr(TapeLinearisation, name)

        def counted(self, vector, name=name, product=product):
            counts[name] += 1
            return product(self, vector)

        monkeypatch.setattr(TapeLinearisation, name, counted)
    return counts


def test_products_are_counted(monkeypatch):
    counts = counting(monkeypatch)
    W = torch.randn(3, 4, requires_grad=True)
    F = FisherOperator(td.Categorical(logits=torch.randn(5, 3) @ W), [W])
    counts.update(jvp=0, vjp=0)  # a graph seen for the first time is compared with autograd
    R = F.root()
    assert counts == {"metric": 5, "jvp": 0, "vjp": 0}  # C + 1
    y = R.mv(torch.ones(12))
    assert counts == {"metric": 5, "jvp": 1, "vjp": 0}
    R.rmv(y)
    assert counts == {"metric": 5, "jvp": 1, "vjp": 1}
    R.lift(y)
    solution = lsqr(R, y, damping=0.1)
    assert counts["metric"] == 5
    assert counts["jvp"] + counts["vjp"] == 2 + solution.products


def test_nothing_is_written_to_and_no_graph_is_built():
    F, u, _ = softmax_regression(torch.float64)
    R = F.root()
    v, y, kept = torch.randn(40).double(), torch.randn(240).double(), u.clone()
    first = R.mv(v), R.rmv(y), R.lift(u)
    kept_v, kept_y = v.clone(), y.clone()
    again = R.mv(v), R.rmv(y), R.lift(u)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(first, again, strict=True))
    assert torch.equal(v, kept_v)
    assert torch.equal(y, kept_y)
    assert torch.equal(u, kept)
    assert torch.equal(F.root().mv(v), first[0])
    assert not R.lift(u.clone().requires_grad_()).requires_grad
