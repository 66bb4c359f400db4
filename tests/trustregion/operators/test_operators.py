import pytest
import torch
from torch import distributions as td
from torch.nn.functional import scaled_dot_product_attention

import oracles
from cases import N, cases
from laws import check_operator
from trustregion import FisherOperator, Identity, KLHessianOperator, to_dense
from trustregion.operators import DenseOperator, FunctionOperator
from trustregion.operators.map import DenseMap, FunctionMap, as_map, wide_mv, wide_rmv

CASES = {case.name: case for case in cases()}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


@each_case
def test_fisher_equals_the_hessian_of_torchs_kl(case):
    F = FisherOperator(case.predict(case.params), case.params)
    check_operator(F, oracles.kl_hessian(case.predict, case.params))


@pytest.mark.parametrize(
    "case",
    [c for c in CASES.values() if c.discrete],
    ids=[n for n, c in CASES.items() if c.discrete],
)
def test_fisher_equals_the_score_covariance_over_all_outcomes(case):
    F = FisherOperator(case.predict(case.params), case.params)
    check_operator(F, oracles.score_covariance(case.predict, case.params))


@each_case
def test_kl_hessian_operator_equals_the_fisher(case):
    H = KLHessianOperator(case.predict(case.params), case.params)
    F = FisherOperator(case.predict(case.params), case.params)
    check_operator(H, to_dense(F))


@each_case
def test_fisher_is_positive_semidefinite(case):
    dense = to_dense(FisherOperator(case.predict(case.params), case.params))
    eigenvalues = torch.linalg.eigvalsh(dense)
    assert eigenvalues[0] >= -1e-12 * eigenvalues[-1]


@pytest.mark.parametrize("name", list(CASES))
def test_float32_products_agree_with_float64(name):
    small = next(c for c in cases(torch.float32) if c.name == name)
    F = FisherOperator(small.predict(small.params), small.params)
    exact = to_dense(FisherOperator(CASES[name].predict(CASES[name].params), CASES[name].params))
    # 1e-5 of the largest entry: rounding of two chained float32 passes
    atol = 1e-5 * exact.abs().max().item()
    torch.testing.assert_close(to_dense(F).double(), exact, rtol=1e-4, atol=atol)


def linear_policy(x, W):
    return td.Categorical(logits=x @ W)


def test_fisher_of_a_joined_batch_is_the_weighted_mean():
    W = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    F_x, F_y, F = (
        to_dense(FisherOperator(linear_policy(b, W), [W])) for b in (x, y, torch.cat([x, y]))
    )
    torch.testing.assert_close(F, (5 * F_x + 2 * F_y) / 7, rtol=1e-12, atol=1e-15)


def test_unused_and_frozen_parameters_have_rows_of_exact_zeros():
    W = torch.randn(3, 4, requires_grad=True)
    unused, frozen = torch.randn(2, requires_grad=True), torch.randn(4)
    x = torch.randn(5, 3)
    F = FisherOperator(td.Categorical(logits=x @ W + frozen), [unused, W, frozen])
    dense = to_dense(F)
    alone = to_dense(FisherOperator(td.Categorical(logits=x @ W + frozen), [W]))
    assert torch.equal(dense[2:14, 2:14], alone)
    dense[2:14, 2:14] = 0
    assert torch.equal(dense, torch.zeros_like(dense))


def test_noncontiguous_parameters():
    storage = torch.randn(4, 3, dtype=torch.float64)
    W = storage.t().requires_grad_()
    x = torch.randn(5, 3, dtype=torch.float64)
    assert not W.is_contiguous()
    dense = to_dense(FisherOperator(linear_policy(x, W), [W]))
    torch.testing.assert_close(
        dense, oracles.kl_hessian(lambda p: linear_policy(x, p[0]), [W]), rtol=1e-9, atol=1e-12
    )


def test_shift_of_all_logits_is_in_the_null_space():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    F = FisherOperator(td.Categorical(logits=logits), [logits])
    assert (F @ torch.ones(24, dtype=torch.float64)).abs().max() < 1e-16


def test_no_forward_pass_is_run_for_a_product():
    calls = 0
    W = torch.randn(3, 4, requires_grad=True)
    net = torch.nn.Linear(3, 3)

    def count(*_):
        nonlocal calls
        calls += 1

    net.register_forward_hook(count)
    F = FisherOperator(linear_policy(net(torch.randn(5, 3)), W), [*net.parameters(), W])
    for _ in range(5):
        F @ torch.randn(F.shape[0])
    assert calls == 1


def test_products_build_no_graph_and_leave_grad_alone():
    case = CASES["categorical"]
    F = FisherOperator(case.predict(case.params), case.params)
    product = F @ torch.randn(F.shape[0], dtype=torch.float64)
    assert not product.requires_grad
    assert all(p.grad is None for p in case.params)


def test_a_prediction_without_a_graph_is_refused():
    W = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(ValueError, match="carry no graph"):
        FisherOperator(linear_policy(torch.randn(5, 3), W.detach()), [W])
    other = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(ValueError, match="not depend on the parameters"):
        FisherOperator(linear_policy(torch.randn(5, 3), other), [W])
    with pytest.raises(ValueError, match="all of them are frozen"):
        FisherOperator(linear_policy(torch.randn(5, 3), other), [W.detach()])
    for params in ([W.detach()], [W]):
        with pytest.raises(ValueError, match="does not depend"):
            KLHessianOperator(linear_policy(torch.randn(5, 3), W.detach()), params)


def test_a_freed_graph_is_named():
    W = torch.randn(3, 4, requires_grad=True)
    distribution = td.Categorical(logits=torch.tanh(torch.randn(5, 3) @ W))
    distribution.logits.sum().backward()
    with pytest.raises(RuntimeError, match="must not call backward"):
        FisherOperator(distribution, [W])


def test_double_backward_of_fused_attention_is_refused_with_the_way_out():
    W = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(N, 1, 5, 8)
    attended = scaled_dot_product_attention(x @ W, x, x)
    with pytest.raises(RuntimeError, match="MATH"):
        FisherOperator(td.Normal(attended.flatten(1), 1.0), [W], backend="graph") @ torch.ones(64)


def test_other_errors_of_the_graph_pass_unchanged():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("mine")

    W = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"^mine$"):
        FisherOperator(td.Normal(Broken.apply(W), 1.0), [W])


def matrix(n=4):
    A = torch.randn(n, n, dtype=torch.float64)
    return A + A.T


def test_operator_algebra_matches_dense_algebra():
    A, B = matrix(), matrix()
    identity = Identity(4, torch.float64)
    op = 2 * DenseOperator(A) + DenseOperator(B) * 0.5 + 0.1 * identity
    check_operator(op, 2 * A + 0.5 * B + 0.1 * torch.eye(4, dtype=torch.float64))
    check_operator(FunctionOperator(lambda v: A @ v, 4, torch.float64), A)


def test_operators_refuse_what_does_not_fit():
    A = DenseOperator(matrix())
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        A @ torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="dtype"):
        A @ torch.ones(4)
    with pytest.raises(ValueError, match="cannot add"):
        A + Identity(3, torch.float64)
    with pytest.raises(ValueError, match="square"):
        DenseOperator(torch.ones(2, 3))
    with pytest.raises(ValueError, match="finite number"):
        A * float("nan")
    with pytest.raises(TypeError):
        A + 3
    with pytest.raises(TypeError):
        A * "3"
    for wrong in (lambda v: v[:2], lambda v: v.float(), lambda _: None):
        with pytest.raises(ValueError, match="must map a vector"):
            FunctionOperator(wrong, 4, torch.float64) @ torch.ones(4, dtype=torch.float64)


def dense_map(J):
    """The matrix of a map by its products with ``J``, column by column."""
    eye = torch.eye(J.shape[1], dtype=J.dtype)
    return torch.stack([J.mv(e) for e in eye], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(CASES))
def test_jacobian_of_the_outputs_equals_autograd(name, dtype):
    case = next(c for c in cases(dtype) if c.name == name)
    J = FisherOperator(case.predict(case.params), case.params).jacobian
    exact = oracles.output_jacobian(CASES[name].predict, CASES[name].params)
    assert (J.shape, J.dtype) == (tuple(exact.shape), dtype)
    # a few chained products
    atol = 50 * torch.finfo(dtype).eps * exact.abs().max().item()
    torch.testing.assert_close(dense_map(J).double(), exact, rtol=0, atol=atol)
    torch.testing.assert_close(J.rows().double(), exact, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(CASES))
def test_fisher_is_jacobian_metric_jacobian(name, dtype):
    case = next(c for c in cases(dtype) if c.name == name)
    F = FisherOperator(case.predict(case.params), case.params)
    J, v = F.jacobian, torch.randn(F.shape[0], dtype=dtype)
    assert torch.equal(J.rmv(F.metric(J.mv(v))) / F.batch_size, F @ v)
    H = to_dense(FunctionOperator(F.metric, J.shape[0], dtype)).double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(H, H.T, rtol=0, atol=10 * eps * H.abs().max().item())
    assert torch.linalg.eigvalsh(H)[0] >= -10 * eps * H.abs().max()
    assert not F.metric(J.mv(v)).requires_grad
    assert not J.mv(v).requires_grad


def test_metric_of_a_categorical_is_its_covariance():
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    F = FisherOperator(td.Categorical(logits=logits), [logits])
    p = torch.softmax(logits.detach(), -1)
    expected = torch.block_diag(*(torch.diag(q) - q.outer(q) for q in p))
    H = to_dense(FunctionOperator(F.metric, 6, torch.float64))
    torch.testing.assert_close(H, expected, rtol=1e-12, atol=1e-15)


def test_metric_and_jacobian_of_outputs_in_another_dtype():
    W = torch.randn(3, 4, requires_grad=True)
    F = FisherOperator(linear_policy(torch.randn(5, 3).double(), W.double()), [W])
    v = torch.randn(12)
    assert F.jacobian.mv(v).dtype == torch.float32
    # the outputs are rounded to float32 in between here, and not in the product
    torch.testing.assert_close(F.jacobian.rmv(F.metric(F.jacobian.mv(v))) / 5, F @ v)


def counted(matrix):
    calls = []

    def adjoint(u):
        calls.append(u)
        return matrix.T @ u

    return FunctionMap(lambda v: matrix @ v, adjoint, tuple(matrix.shape), matrix.dtype), calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 5), (3, 7), (300, 20), (600, 9000), (4, 0)])
def test_gram_is_j_j_transposed_in_float64(shape, dtype):
    matrix = torch.randn(shape, dtype=dtype)
    exact = matrix.double() @ matrix.double().T
    K = DenseMap(matrix).gram()
    assert torch.equal(K, K.T)
    # sums of up to 9000 products, in another order
    torch.testing.assert_close(K, exact, rtol=0, atol=1e-13 * max(1.0, exact.abs().max().item()))
    if shape[0] <= 3:
        J, calls = counted(matrix)
        assert torch.equal(J.gram(), K)
        assert len(calls) == shape[0]


def test_rows_of_a_map_are_m_products_and_of_a_matrix_none():
    matrix = torch.randn(3, 5)
    J, calls = counted(matrix)
    assert torch.equal(J.rows(), matrix)
    assert torch.equal(torch.stack(calls), torch.eye(3))
    assert DenseMap(matrix).rows() is matrix


@pytest.mark.parametrize("power", [-500, -3, 4, 500])
def test_an_exponent_keeps_the_gram_matrix_in_range(power):
    matrix = torch.randn(3, 5, dtype=torch.float64)
    assert torch.equal(DenseMap(matrix * 2.0**power).gram(power), DenseMap(matrix).gram())


@pytest.mark.parametrize("shape", [(1, 5), (3, 7), (600, 9000)])
def test_wide_products_are_those_of_the_matrix_in_float64(shape):
    rows = torch.randn(shape)
    v, u = (torch.randn(k, dtype=torch.float64) for k in reversed(shape))
    torch.testing.assert_close(wide_mv(rows, v, 2), rows.double() @ v / 4, rtol=0, atol=1e-11)
    torch.testing.assert_close(wide_rmv(rows, u, 2), rows.double().T @ u / 4, rtol=0, atol=1e-11)


def test_maps_refuse_what_does_not_fit():
    with pytest.raises(TypeError, match="got list: make a map"):
        as_map([1.0])
    with pytest.raises(ValueError, match=r"a matrix \(m, n\) is needed"):
        as_map(torch.ones(3))
    J = FunctionMap(lambda v: v[:1], lambda u: u.double(), (2, 3))
    with pytest.raises(ValueError, match=r"J v must have shape \(2,\)"):
        J.mv(torch.ones(3))
    with pytest.raises(ValueError, match=r"J' u must have shape \(3,\)"):
        J.rmv(torch.ones(2))
