"""What conjugate gradients accept: zeros, extremes, any operator; and what they refuse."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from counting import Counting
from strategies import DTYPES, systems
from trustregion import Status, cg
from trustregion.operators import DenseOperator


@pytest.mark.parametrize(
    ("power", "dtype"),
    [(p, d) for p in (-140, -60, 60, 120) for d in DTYPES]
    + [(p, torch.float64) for p in (-1060, -700, 700, 1020)],
)
def test_no_scale_of_the_right_hand_side_is_out_of_reach(power, dtype):
    A = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=dtype))
    b = torch.ones(3, dtype=torch.float64)
    solution = cg(A, (b * 2.0**power).to(dtype))
    assert solution.status is Status.CONVERGED
    plain = (cg(A, b.to(dtype)).x.double() * 2.0**power).to(dtype)  # subnormal at the low end
    torch.testing.assert_close(solution.x, plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_right_hand_side_has_the_zero_solution(dtype):
    A = Counting(torch.eye(3, dtype=dtype))
    solution = cg(A, torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype))
    assert torch.equal(solution.x, torch.zeros(3, dtype=dtype))
    assert (solution.status, A.products) == (Status.CONVERGED, 0)


bad_numbers = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])


@bad_numbers
def test_nonfinite_input_is_named(bad):
    b = torch.tensor([1.0, bad])
    solution = cg(torch.eye(2), b)
    assert solution.status is Status.NONFINITE_INPUT
    assert torch.equal(solution.x, torch.zeros(2))
    solution = cg(torch.eye(2), torch.ones(2), b)
    assert solution.status is Status.NONFINITE_INPUT
    assert solution.x.isfinite().all()


@bad_numbers
@given(system=systems(max_n=12), at=st.integers(1, 8), warm=st.booleans(), where=st.booleans())
def test_a_nonfinite_product_keeps_the_last_finite_iterate(bad, system, at, warm, where):
    calls = 0

    def poisoned(v):
        nonlocal calls
        calls += 1
        out = v.clone() if where else system.A @ v
        if calls == at:
            out[0] = bad
        return out

    x0 = torch.zeros_like(system.b) if warm else None
    if where:
        solution = cg(system.A, system.b, x0, M=poisoned, rtol=0.0)
    else:
        solution = cg(poisoned, system.b, x0, rtol=0.0)
    assert solution.x.isfinite().all()
    assert math.isfinite(solution.curvature)
    if calls >= at:
        assert solution.status is Status.NONFINITE_OPERATOR


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e20, 1e38])
def test_operators_of_extreme_scale_never_give_a_nan(scale):
    A = torch.eye(3) * scale
    solution = cg(A, torch.ones(3))
    assert solution.x.isfinite().all()
    if solution.status is Status.CONVERGED:
        torch.testing.assert_close(A @ solution.x, torch.ones(3), rtol=1e-4, atol=0)


@given(
    st.lists(st.floats(width=32), min_size=9, max_size=9),
    st.lists(st.floats(width=32), min_size=3, max_size=3),
    st.sampled_from(DTYPES),
)
@example([0.0] * 9, [1.0] * 3, torch.float32)
def test_no_input_gives_a_nan(entries, b, dtype):
    A = torch.tensor(entries, dtype=dtype).view(3, 3)
    solution = cg(A, torch.tensor(b, dtype=dtype))
    assert solution.x.isfinite().all()
    assert not math.isnan(solution.residual_norm)


def test_operator_tensor_and_callable_are_the_same():
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    b = torch.ones(3)
    x = cg(A, b).x
    assert torch.equal(cg(DenseOperator(A), b).x, x)
    assert torch.equal(cg(lambda v: A @ v, b).x, x)


def test_the_inputs_are_not_written_to_and_no_graph_is_built():
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0])).requires_grad_()
    b, x0 = torch.ones(3), torch.full((3,), 0.1)
    solution = cg(A, b, x0)
    assert torch.equal(b, torch.ones(3))
    assert torch.equal(x0, torch.full((3,), 0.1))
    assert not solution.x.requires_grad


eye = torch.eye(2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((eye, [1.0, 2.0]), {}, TypeError, "got list"),
        ((eye, torch.ones(2, dtype=torch.complex64)), {}, TypeError, "complex64"),
        ((eye, torch.ones(2, dtype=torch.int64)), {}, TypeError, "int64"),
        ((eye, torch.ones(2, 2, 2)), {}, ValueError, "vector of shape"),
        ((eye, torch.ones(3)), {}, ValueError, "does not fit"),
        ((torch.ones(2, 3), torch.ones(2)), {}, ValueError, "square"),
        ((eye.double(), torch.ones(2)), {}, ValueError, "does not fit"),
        (("A", torch.ones(2)), {}, TypeError, "got str"),
        ((eye, torch.ones(2), torch.ones(3)), {}, ValueError, "x0 must"),
        ((eye, torch.ones(2)), {"rtol": -1.0}, ValueError, "rtol"),
        ((eye, torch.ones(2)), {"rtol": math.nan}, ValueError, "rtol"),
        ((eye, torch.ones(2)), {"max_iter": -1}, ValueError, "max_iter"),
        ((eye, torch.ones(2)), {"max_iter": 2.5}, ValueError, "max_iter must be an integer"),
        ((eye, torch.ones(2)), {"M": torch.eye(3)}, ValueError, "does not fit"),
        ((lambda v: v[:1], torch.ones(2)), {}, ValueError, "must map"),
    ],
)
def test_wrong_arguments_are_refused_in_words(arguments, options, error, words):
    with pytest.raises(error, match=words):
        cg(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"progress_tol": 0.0}, "progress_tol"),
        ({"b": torch.ones(2, 2), "callback": print}, "callback takes"),
        ({"b": torch.ones(2, 2), "x0": torch.ones(2)}, "x0 must"),
        ({"atol": math.nan}, "atol"),
    ],
)
def test_more_wrong_arguments_are_refused_in_words(options, words):
    arguments = {"A": torch.eye(2), "b": torch.ones(2), **options}
    with pytest.raises(ValueError, match=words):
        cg(arguments.pop("A"), arguments.pop("b"), arguments.pop("x0", None), **arguments)


class Reusing(DenseOperator):
    """Returns the same buffer every time, as allocation-free code does."""

    def __init__(self, matrix):
        super().__init__(matrix)
        self.buffer = torch.empty(matrix.shape[0], dtype=matrix.dtype)

    def mv(self, v):
        return torch.mv(self.matrix, v, out=self.buffer)

    def mm(self, V):
        return super(DenseOperator, self).mm(V)  # the default


@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_may_reuse_their_output(dtype):
    matrix = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=dtype))
    B = torch.tensor([[1.0, 4.0], [1.0, 2.0], [1.0, 1.0]], dtype=dtype)
    torch.testing.assert_close(cg(Reusing(matrix), B).x, cg(matrix, B).x)
    torch.testing.assert_close(cg(Reusing(matrix), B[:, 0]).x, cg(matrix, B[:, 0]).x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_operator_that_writes_to_its_argument_is_refused(dtype):
    d, b = torch.tensor([1.0, 2.0], dtype=dtype), torch.ones(2, dtype=dtype)
    with pytest.raises(ValueError, match="writes to the vector"):
        cg(lambda v: v.mul_(d), b)
    with pytest.raises(ValueError, match="writes to the vector"):
        cg(torch.eye(2, dtype=dtype), b, M=lambda v: v.mul_(d))


def test_products_of_a_wrong_shape_are_refused_from_a_subclass_too():
    class Sum(DenseOperator):
        def mv(self, v):
            return (self.matrix @ v).sum()

    with pytest.raises(ValueError, match="must map a vector"):
        cg(Sum(torch.eye(2)), torch.ones(2))


def test_a_product_may_differentiate():
    """The commonest Hessian-vector product: a second backward pass through a kept gradient."""
    p = torch.tensor([1.0, 2.0], requires_grad=True)
    (g,) = torch.autograd.grad((p**3).sum(), p, create_graph=True)
    solution = cg(lambda v: torch.autograd.grad(g @ v, p, retain_graph=True)[0], torch.ones(2))
    torch.testing.assert_close(solution.x, 1 / (6 * p.detach()))
    assert not solution.x.requires_grad


def test_a_start_too_large_for_the_scale_is_given_back():
    x0 = torch.full((2,), 1e30)
    solution = cg(torch.eye(2), torch.full((2,), 1e-30), x0)
    assert torch.equal(solution.x, x0)
    assert solution.status is Status.NONFINITE_OPERATOR


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rtol": [1e-5]}, "rtol must be a number.*type list"),
        ({"atol": None}, "atol must be a number.*NoneType"),
        ({"rtol": torch.tensor(1e-5)}, "item"),
        ({"max_iter": True}, "max_iter must be an integer.*bool"),
        ({"max_products": -1}, "max_products"),
    ],
)
def test_numbers_of_a_wrong_type_are_refused_by_type(options, words):
    with pytest.raises(ValueError, match=words):
        cg(torch.eye(2), torch.ones(2), **options)


def test_numpy_scalars_are_numbers():
    np = pytest.importorskip("numpy")
    solution = cg(torch.eye(2), torch.ones(2), rtol=np.float32(1e-3), max_iter=np.int64(3))
    assert solution.status is Status.CONVERGED
