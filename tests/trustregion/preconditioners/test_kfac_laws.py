"""Laws of KFAC as a preconditioner: positive, scale-free, finite, repeatable."""

import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as td
from torch import nn

from kfac_models import FAMILIES, Gaussian, each_dtype, factors_of, fisher, mlp, normal
from strategies import DTYPES
from trustregion import FisherOperator, Identity, Status, cg, to_dense
from trustregion.preconditioners.kfac import KFAC
from trustregion.preconditioners.kronecker import KroneckerBlock, KroneckerInverse
from trustregion.vector import ParameterVector


def curvature(M, damping):
    """The approximation that M inverts."""
    inverse = to_dense(M).double()
    return torch.linalg.inv(inverse) - damping * torch.eye(len(inverse), dtype=torch.float64)


@st.composite
def networks(draw):
    """A network, its operator and a damping; dead units, huge and tiny scales, one sample."""
    dtype = draw(st.sampled_from(DTYPES))
    sizes = draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    model = mlp(*sizes, activation=draw(st.sampled_from([nn.Tanh, nn.ReLU]))).to(dtype)
    with torch.no_grad():
        model[0].weight.mul_(10.0 ** draw(st.integers(-20, 4)))
        if draw(st.booleans()):
            model[0].bias.fill_(-1e3)
        if draw(st.booleans()):
            model[-1].weight.zero_()
    shape = (draw(st.integers(1, 5)), sizes[0])
    x = torch.randn(shape, dtype=dtype) * 10.0 ** draw(st.integers(-18, 2))
    family = draw(st.sampled_from([normal, FAMILIES["categorical"], FAMILIES["bernoulli"]]))
    F = fisher(model, x, family)
    damping = draw(st.sampled_from([0.0, 1e-300, 1e-12, 1e-3, 1.0, 1e12]))
    return model, F, damping


@given(networks(), st.sampled_from([1, "exact"]))
def test_it_is_symmetric_and_positive_definite(drawn, samples):
    model, F, damping = drawn
    M = KFAC(model, samples=samples).build(F, damping)
    assert (M.shape, M.dtype) == (F.shape, F.dtype)
    dense = to_dense(M)
    assert dense.isfinite().all()
    eps, size = torch.finfo(F.dtype).eps, dense.abs().max()
    assert (dense - dense.T).abs().max() <= 50 * eps * size
    # as cg sees it, also where the inverse is nearly singular
    for r in [*torch.randn(5, F.shape[0], dtype=F.dtype), *torch.eye(F.shape[0], dtype=F.dtype)]:
        assert (r.double() @ (M @ r).double()) > 0
    for v in torch.linalg.eigh(dense.double())[1].T.to(F.dtype):
        assert (v.double() @ (M @ v).double()) > 0


@given(networks())
def test_it_never_makes_a_solve_break_down(drawn):
    model, F, damping = drawn
    b = F @ torch.randn(F.shape[0], dtype=F.dtype)
    A = F + damping * Identity(len(b), F.dtype)
    solution = cg(A, b, M=KFAC(model).build(F, damping), rtol=1e-2)
    assert solution.status not in (Status.INDEFINITE_PRECONDITIONER, Status.NONFINITE_OPERATOR)
    assert solution.x.isfinite().all()


@given(networks())
def test_at_a_large_damping_it_is_the_identity_over_the_damping(drawn):
    model, F, _ = drawn
    kfac = KFAC(model, every=2)
    kfac.build(F, 1.0)
    blocks = kfac.state["blocks"].values()
    damping = 1e6 * max([1.0, *(block["curvature"].max().item() for block in blocks)])
    v = torch.randn(F.shape[0], dtype=F.dtype)
    found = damping * (kfac.build(F, damping) @ v)
    torch.testing.assert_close(found, v, rtol=0, atol=1e-5 * v.norm().item())


@each_dtype
@pytest.mark.parametrize("power", [-30, -7, 9, 30])
@pytest.mark.parametrize("damping", [0.0, 0.25])
def test_it_scales_by_powers_of_two_exactly(dtype, power, damping):
    model, x = mlp(3, 5, 2).to(dtype), torch.randn(20, 3, dtype=dtype)
    y = model(x)
    one = FisherOperator(normal(y, 1.0), model.parameters())
    scaled = FisherOperator(normal(y, 2.0**power), model.parameters())
    v = torch.randn(one.shape[0], dtype=dtype)
    expected = KFAC(model).build(one, damping) @ v
    found = KFAC(model).build(scaled, damping * 4.0**-power) @ v
    assert torch.equal(found, expected * 4.0**power)


@each_dtype
def test_inputs_of_any_scale_keep_their_factors(dtype):
    """Squares of the inputs leave the range of float32; those of float64 do not."""
    for scale in (2.0**-70, 2.0**70):
        layer = nn.Linear(3, 2, bias=False).to(dtype)
        x = torch.randn(20, 3, dtype=dtype)
        kfac, plain = KFAC(layer, samples="exact"), KFAC(layer, samples="exact")
        plain.build(fisher(layer, x), 1.0)
        kfac.build(fisher(layer, scale * x), 1.0)
        (A, _), (wanted, _) = factors_of(kfac)[0], factors_of(plain)[0]
        torch.testing.assert_close(A, scale * (scale * wanted))


def test_an_inverse_beyond_the_range_of_float32_is_right_up_to_a_factor():
    like, diagonal = Identity(3), torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    for e in (-1000, -140, 140, 1000):
        M = KroneckerInverse(like, [], diagonal * 2.0**e, 0.0)
        assert (M @ torch.ones(3)).tolist() in ([8.0, 4.0, 2.0], [4.0, 2.0, 1.0])
    M = KroneckerInverse(like, [], torch.tensor([2.0, 3.0, 5.0]).double(), 3.0)
    torch.testing.assert_close(M @ torch.ones(3), torch.tensor([1 / 5, 1 / 6, 1 / 8]))


def test_curvature_below_rounding_is_raised_and_none_at_all_takes_the_largest():
    eps = torch.finfo(torch.float32).eps
    eye = torch.eye(2, dtype=torch.float64)
    zero = KroneckerBlock(2, None, eye, eye, torch.zeros(2, 2, dtype=torch.float64))
    diagonal = torch.tensor([4.0, 0.0, 9.0, 9.0, 9.0, 9.0], dtype=torch.float64)
    M = KroneckerInverse(Identity(6), [zero], diagonal, 0.0)
    expected = torch.tensor([0.25, 0.25 / eps, 0.25, 0.25, 0.25, 0.25])
    assert torch.equal(M @ torch.ones(6), expected)
    nothing = KroneckerInverse(Identity(6), [zero], torch.zeros(6).double(), 0.0)
    assert torch.equal(nothing @ torch.ones(6), torch.ones(6))


class Overflowing(nn.Module):
    """The gradient at the first layer's output is not finite, that at the second's is."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.log_std = (
            mlp(3, 4),
            nn.Linear(3, 2),
            nn.Parameter(torch.ones(2)),
        )

    def forward(self, x):
        hidden = self.first(x)
        infinite = (hidden - hidden.detach()).abs().sqrt().sum(-1, keepdim=True)
        return td.Normal(self.second(x) + infinite, self.log_std.exp(), validate_args=False)


def test_a_layer_whose_gradients_are_not_finite_is_damped_only():
    model = Overflowing().double()
    x = torch.randn(10, 3, dtype=torch.float64)
    F = FisherOperator(model(x), model.parameters())
    kfac = KFAC(model)
    M = kfac.build(F, 0.5)
    assert list(kfac.state["blocks"]) == [3]
    v = torch.randn(F.shape[0], dtype=torch.float64)
    assert torch.equal((M @ v)[2:18], 2 * v[2:18])
    assert (M @ v)[18:].isfinite().all()


def nan_batch(model, samples=9):
    y = model(torch.full((samples, 3), math.nan))
    return FisherOperator(td.Normal(y, 1.0, validate_args=False), model.parameters())


def test_a_batch_of_nan_is_damped_only_and_the_solve_reports_it():
    model = mlp(3, 4, 2)
    kfac = KFAC(model)
    M = kfac.build(nan_batch(model), 0.5)
    assert kfac.state["blocks"] == {}
    v = torch.randn(26)
    assert torch.equal(M @ v, 2 * v)
    solution = cg(nan_batch(model), v, M=M)
    assert solution.status is Status.NONFINITE_OPERATOR


def test_an_estimate_that_is_not_finite_is_discarded():
    policy = Gaussian(3, 4, 2)
    kfac = KFAC(policy)
    with torch.no_grad():
        policy.log_std[0] = -60.0  # the square of the scale underflows
    distribution = policy(torch.randn(9, 3))
    M = kfac.build(FisherOperator(distribution, policy.parameters()), 0.5)
    assert (M @ torch.ones(28)).isfinite().all()
    assert kfac.state["diagonal"].isfinite().all()


@pytest.mark.parametrize("every", [1, 3])
def test_factors_are_shared_by_every_few_solves(every):
    model = mlp(3, 4, 2)
    kfac = KFAC(model, every=every)
    F = fisher(model, torch.randn(30, 3))
    seen = []
    for _ in range(6):
        kfac.build(F, 0.1)
        seen.append(factors_of(kfac)[0][1])
        assert kfac.products == 0
        assert (kfac.overhead > 0) == ((len(seen) - 1) % every == 0)
    for i, factor in enumerate(seen[1:], start=1):
        assert torch.equal(factor, seen[i - 1]) == (i % every != 0)


def test_the_damping_is_that_of_the_solve():
    model = mlp(3, 4, 2).double()
    F = fisher(model, torch.randn(30, 3, dtype=torch.float64))
    kfac = KFAC(model, every=5)
    first = curvature(kfac.build(F, 0.1), 0.1)
    torch.testing.assert_close(curvature(kfac.build(F, 2.0), 2.0), first)


def test_the_average_is_a_mean_at_first_and_then_forgets():
    model = nn.Sequential(nn.LayerNorm(3), *mlp(3, 4, 2)).double()
    apart, together = KFAC(model), KFAC(model, decay=0.6)
    wanted = []
    for k, weight in enumerate([0.0, 1 / 2, 0.6, 0.6]):
        F = fisher(model, torch.randn(9, 3, dtype=torch.float64))
        M = together.build(F, 0.1)
        apart.build(F, 0.1)
        new = [*factors_of(apart)[0], *factors_of(apart)[1], apart.state["diagonal"]]
        old = wanted if k else new
        wanted = [weight * a + (1 - weight) * b for a, b in zip(old, new, strict=True)]
        found = [*factors_of(together)[0], *factors_of(together)[1], together.state["diagonal"]]
        torch.testing.assert_close(found, wanted)
    A, G, diagonal = wanted[0], wanted[1], wanted[-1]  # and the average is what is inverted
    found = curvature(M, 0.1)
    torch.testing.assert_close(found[6:18, 6:18], torch.kron(G, A[:3, :3].contiguous()))
    torch.testing.assert_close(found.diagonal()[:6], diagonal[:6])
    assert diagonal[:6].any()


def test_a_batch_that_is_not_finite_leaves_the_average():
    model = mlp(3, 4, 2)
    kfac = KFAC(model, decay=0.5)
    F, v = fisher(model, torch.randn(9, 3)), torch.randn(26)
    before = kfac.build(F, 0.1) @ v
    assert torch.equal(kfac.build(nan_batch(model), 0.1) @ v, before)
    policy = Gaussian(3, 4, 2)
    kfac = KFAC(policy, decay=0.5)
    kfac.build(FisherOperator(policy(torch.randn(9, 3)), policy.parameters()), 0.1)
    before = kfac.state["diagonal"]
    with torch.no_grad():
        policy.log_std[0] = -60.0  # the square of the scale underflows
    kfac.build(FisherOperator(policy(torch.randn(9, 3)), policy.parameters()), 0.1)
    assert torch.equal(kfac.state["diagonal"], before)


def test_draws_repeat_with_the_seed_and_leave_the_global_generator():
    model, x = mlp(3, 4, 2), torch.randn(30, 3)
    F, v = fisher(model, x), torch.randn(26)
    before = torch.get_rng_state()
    first, again, other = (KFAC(model, seed=seed) for seed in (5, 5, 6))
    a, b = first.build(F, 0.1) @ v, again.build(F, 0.1) @ v
    assert torch.equal(a, b)
    assert not torch.equal(a, other.build(F, 0.1) @ v)
    assert not torch.equal(a, first.build(F, 0.1) @ v)  # a draw of its own for each build
    assert torch.equal(torch.get_rng_state(), before)


def test_a_saved_state_continues_as_if_it_had_not_stopped(tmp_path):
    model, x = mlp(3, 4, 2), torch.randn(30, 3)
    F, v = fisher(model, x), torch.randn(26)
    options = {"every": 2, "decay": 0.5}
    kfac, resumed = KFAC(model, **options), KFAC(model, **options)
    for _ in range(3):
        kfac.build(F, 0.1)
    torch.save(kfac.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(4):
        assert torch.equal(resumed.build(F, 0.1) @ v, kfac.build(F, 0.1) @ v)


def test_nothing_of_the_graph_is_kept():
    model, saved = mlp(3, 4, 2), []
    model[1].register_forward_hook(lambda *args: saved.append(weakref.ref(args[-1])))
    kfac = KFAC(model)
    F = fisher(model, torch.randn(10, 3))
    M = kfac.build(F, 0.1)
    assert saved[0]() is not None  # the second layer's node holds its input
    del F
    assert saved[0]() is None
    assert (M @ torch.ones(26)).isfinite().all()
    assert not any(p.grad is not None for p in model.parameters())


def qualities(F, dense, g, damping, M, iterations):
    """The linear improvement in the ball of the damped curvature, to the largest, by iteration."""
    A = F + damping * Identity(len(g), F.dtype)
    exact = dense.double() + damping * torch.eye(len(g), dtype=torch.float64)
    g64, found = g.double(), []
    best = (g64 @ torch.linalg.solve(exact, g64)).sqrt()

    def note(x):
        x = x.double()
        found.append((g64 @ x / (x @ exact @ x).sqrt() / best).item())

    cg(A, g, M=M, rtol=0.0, max_iter=iterations, callback=note)
    return found


class Normed(nn.Module):
    """Embeddings and a norm, which have a diagonal only."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(20, 8), nn.LayerNorm(16)
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, tokens):
        return self.head(self.norm(torch.tanh(self.hidden(self.embed(tokens)))))


@each_dtype
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["deep", "normed"])
def test_three_iterations_with_it_beat_eight_without(name, seed, dtype):
    torch.manual_seed(seed)
    if name == "deep":
        model, family = mlp(8, 16, 16, 16, 4).to(dtype), normal
        x = torch.randn(400, 8, dtype=dtype) * torch.logspace(0, -2, 8, dtype=dtype)
    else:
        model, family = Normed().to(dtype), FAMILIES["categorical"]
        x = (20 * torch.rand(400) ** 2).long()
    distribution = family(model(x))
    log_prob = distribution.log_prob(distribution.sample()).reshape(400, -1).sum(1)
    loss, params = -(torch.randn(400, dtype=dtype) * log_prob).mean(), list(model.parameters())
    g = ParameterVector(params).ravel(torch.autograd.grad(loss, params, retain_graph=True))
    F = FisherOperator(distribution, params)
    dense = to_dense(F)
    plain = qualities(F, dense, g, 1e-3, None, 8)
    quick = qualities(F, dense, g, 1e-3, KFAC(model).build(F, 1e-3), 8)
    assert quick[2] > plain[7]
    assert quick[7] > 0.95


def test_the_work_it_declares_follows_the_layers():
    policy = mlp(17, 64, 64, 6)
    F = fisher(policy, torch.randn(2048, 17))
    kfac = KFAC(policy)
    assert kfac.work(F) == 0.0
    kfac.build(F, 0.1)
    assert 0.03 < kfac.work(F) < 0.15
    assert 2 < kfac.overhead < 5
