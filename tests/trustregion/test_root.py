import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as td

from cases import N, cases
from strategies import DTYPES
from trustregion import Family, FisherOperator, Identity, Status, register_distribution, to_dense
from trustregion.distributions import registry as module
from trustregion.linearise import TapeLinearisation
from trustregion.operators.root import FisherRoot
from trustregion.solvers.cg import cg
from trustregion.solvers.least_squares import lsqr

CASES = {case.name: case for case in cases()}
each_case = pytest.mark.parametrize("name", list(CASES))
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def fisher(name, dtype):
    case = next(c for c in cases(dtype) if c.name == name)
    return FisherOperator(case.predict(case.params), case.params)


def columns(R):
    """The matrix of a map by its products with ``R``, column by column."""
    return torch.stack([R.mv(e) for e in torch.eye(R.shape[1], dtype=R.dtype)], dim=1)


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def check_root(F, rounding=50.0):
    R = F.root()
    assert (R.shape, R.dtype) == (F.jacobian.shape, F.dtype)
    matrix, exact = columns(R).double(), to_dense(F).double()
    atol = rounding * torch.finfo(F.dtype).eps * exact.abs().max().item()
    torch.testing.assert_close(matrix.T @ matrix, exact, rtol=0, atol=atol)
    atol = rounding * torch.finfo(F.dtype).eps * matrix.abs().max().item()
    torch.testing.assert_close(R.rows().double(), matrix, rtol=0, atol=atol)
    return R


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
def test_a_sample_whose_metric_is_far_from_the_others(dtype):
    """Scales of one sample that differ beyond rounding: each output keeps its own digits."""
    scale = torch.tensor([[1e-10, 1.0, 1e10], [1.0, 1e12, 1e-12]], dtype=dtype)
    mean = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=dtype, requires_grad=True)
    joint = {"a": td.Normal(mean, scale), "b": td.Categorical(logits=logits)}
    F = FisherOperator(joint, [mean, logits])
    R = columns(F.root()).double()
    exact = to_dense(F).double()
    size = exact.diagonal().sqrt()
    gap = (R.T @ R - exact) / size.outer(size)
    assert gap.abs().max() < 20 * torch.finfo(dtype).eps


def test_a_saturated_categorical_in_float32_keeps_the_digits_of_its_root():
    """1 - p in float32 is 0 or 6e-8; the root of the block is of the size 1e-5 all the same."""
    raw = torch.tensor([[0.0, -23.0], [25.0, 0.0]], requires_grad=True)
    R = columns(FisherOperator(td.Categorical(logits=raw), [raw]).root()).double()
    p = torch.softmax(raw.detach().double(), -1)
    exact = torch.block_diag(*(torch.diag(q) - q.outer(q) for q in p)) / 2
    gap = (R.T @ R - exact) / exact.diagonal().outer(exact.diagonal()).sqrt()
    assert gap.abs().max() < 1e-5


def test_a_saturated_categorical_in_float64():
    """Its p (1 - p) is exactly zero where p is not."""
    raw = torch.tensor([[0.0, -40.0, -42.0]], dtype=torch.float64, requires_grad=True)
    R = columns(FisherOperator(td.Categorical(logits=raw), [raw]).root())
    p = torch.softmax(raw.detach(), -1)[0]
    exact = torch.stack([p[1:].sum(), *p[1:]])
    # the rounding of the block is 1e-16 of its entries with unit diagonal
    torch.testing.assert_close((R.T @ R).diagonal(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_nearly_dependent_outputs_keep_their_small_eigenvalue(size):
    """Variances 1 and size^2 along (1, 1) and across: M stretches (1, 1) to one, others by far."""
    mean = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    tril = torch.tensor([[1.0, 0.0], [1.0, size]], dtype=torch.float64)
    R = FisherOperator(td.MultivariateNormal(mean, scale_tril=tril), [mean]).root()
    y = R.mv(torch.ones(6, dtype=torch.float64))
    # rounding over the smallest eigenvalue of the block with unit diagonal
    assert (y @ y).item() == pytest.approx(1.0, rel=1e-15 / size**2)


@pytest.mark.parametrize("C", [3, 30])
def test_rows_of_deficient_rank_are_exact_zeros(C):
    logits = torch.randn(6, C, requires_grad=True)
    R = FisherOperator(td.Categorical(logits=logits), [logits]).root()
    zeros = (R.rows().view(6, C, -1) == 0).all(2)
    assert torch.equal(zeros.sum(1), torch.ones(6, dtype=torch.long))


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


@each_dtype
@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e30, 1e37])
def test_scales_whose_squares_are_out_of_range(scale, dtype):
    """F over- or underflows in float32 where its root does not."""
    mean = torch.zeros(3, dtype=dtype, requires_grad=True)
    s = torch.full((3,), scale, dtype=dtype)
    R = FisherOperator(td.Normal(mean, s), [mean]).root()
    v = torch.ones(3, dtype=dtype)
    size = (1 / s.double() / math.sqrt(3)).to(dtype)
    torch.testing.assert_close(R.mv(v).view(3, 2).abs().sum(1), size)
    u = torch.cat([1 / s, 0 * s])
    torch.testing.assert_close(R.rmv(R.lift(u)), 1 / s)


@each_dtype
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_block_that_is_not_finite_or_zero(bad, dtype):
    mean = torch.zeros(3, 4, dtype=dtype, requires_grad=True)
    s = torch.tensor([1.0, bad, 2.0], dtype=dtype).unsqueeze(1).expand(3, 4)
    R = FisherOperator(td.Normal(mean, s, validate_args=False), [mean]).root()
    y = R.mv(torch.ones(12, dtype=dtype)).view(3, 8)
    assert y[[0, 2]].isfinite().all()
    lifted = R.lift(torch.ones(24, dtype=dtype))
    assert lifted.isfinite().all()
    solution = lsqr(R, torch.ones(24, dtype=dtype), damping=0.1)
    assert solution.x.isfinite().all()
    if bad == math.inf:  # M = 0: known nothing of
        assert torch.equal(y[1], torch.zeros(8, dtype=dtype))
        assert solution.status is Status.CONVERGED
    else:
        assert y[1].isnan().all()
        assert solution.status is Status.NONFINITE_OPERATOR


@each_dtype
@pytest.mark.parametrize("shape", [(), (3,), (3, 2)])
def test_a_distribution_without_a_batch_is_one_sample(shape, dtype):
    mean = torch.randn(shape, dtype=dtype, requires_grad=True)
    log_scale = torch.randn(shape, dtype=dtype, requires_grad=True)
    d = td.Independent(td.Normal(mean, log_scale.exp()), len(shape))
    F = FisherOperator(d, [mean, log_scale])
    assert F.batch_size == 1
    check_root(F)


@each_dtype
def test_more_batch_dimensions_and_several_factors(dtype):
    W = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    x = torch.randn(N, 2, 3, dtype=dtype)
    out = x @ W
    tril = torch.tensor([[2.0, 0.0], [1.0, 0.5]], dtype=dtype)
    prediction = [
        td.Categorical(logits=out),
        td.Independent(td.Normal(out[..., :2], 1.0), 2),
        td.MultivariateNormal(out[:, 0, 2:], scale_tril=tril),
        td.Bernoulli(logits=out[:, 0, 0]),
    ]
    R = check_root(FisherOperator(prediction, [W]))
    assert R.shape == (N * (8 + 4 + 4 + 2 + 4 + 1), 12)


@pytest.mark.parametrize("other", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_outputs_in_another_dtype(other):
    dtype, inner = other
    W = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    out = torch.randn(5, 3, dtype=inner) @ W.to(inner)
    F = FisherOperator(td.Categorical(logits=out), [W])
    R = F.root()
    v = torch.randn(12, dtype=dtype)
    assert R.mv(v).dtype == R.rmv(R.mv(v)).dtype == dtype
    torch.testing.assert_close(R.rmv(R.mv(v)), F @ v, rtol=1e-4, atol=1e-5)


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


def shared_scale(expand):
    """A Gaussian whose family has one scale tensor for all samples, and M adds over them."""

    def fisher_of(params):
        mean, scale = params
        count = len(mean)
        if expand:
            return lambda d: (d[0] / scale**2, 2 * d[1] / scale**2)
        # with a made-up effect of the mean on the scale, as a skewed family has
        return lambda d: (
            d[0] / scale[0] ** 2 + 0.1 * d[1].sum(),
            2 * count * d[1] / scale**2 + 0.1 * d[0].sum(),
        )

    def parameters(d):
        return (d.concentration, d.rate)

    def kl(old, new):
        return old[0] - new[0]

    return Family(parameters, kl, fisher_of)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(module, "_FAMILIES", dict(module._FAMILIES))


class Tied(td.Gamma):
    """Keeps its tensors as given, without one slice a sample."""

    def __init__(self, concentration, rate):
        super().__init__(concentration, rate, validate_args=False)
        self.concentration, self.rate = concentration, rate


@pytest.mark.usefixtures("registry")
def test_a_parameter_that_samples_share_is_refused_in_words():
    register_distribution(Tied, shared_scale(expand=False))
    mean = torch.rand(4, requires_grad=True)
    for shared in (torch.ones(1), torch.ones(())):
        F = FisherOperator({"a": Tied(mean, shared)}, [mean])
        with pytest.raises(ValueError, match=r"of the 4 samples.*\['a'\]Tied: expand"):
            F.root()
    F = FisherOperator(Tied(mean, torch.ones(4)), [mean])  # of the right shape by chance
    with pytest.raises(ValueError, match="effect on others"):
        F.root()
    register_distribution(Tied, shared_scale(expand=True))
    check_root(FisherOperator(Tied(mean, torch.ones(4)), [mean]))


@pytest.mark.parametrize("u", [torch.ones(7), torch.ones(8).double(), torch.ones(2, 4)])
def test_a_derivative_that_does_not_fit_is_refused_in_words(u):
    W = torch.zeros(4, requires_grad=True)
    R = FisherOperator(td.Categorical(logits=W.expand(2, 4)), [W]).root()
    with pytest.raises(ValueError, match=r"u must be a vector of shape \(8,\) and dtype .*got"):
        R.lift(u)
