"""Settings that scopes of several threads hold together."""

import threading
from contextlib import contextmanager

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from trustregion import FisherOperator
from trustregion.optim.calls import comparable_kernels
from trustregion.settings import Shared, math_attention


def attention():
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()


@pytest.mark.parametrize("inner", [math_attention, comparable_kernels])
@pytest.mark.parametrize("outer", [math_attention, comparable_kernels])
def test_scopes_that_overlap_restore_the_setting_in_whichever_order_they_end(outer, inner):
    before = attention()
    one, other = outer(), inner()
    one.__enter__()
    other.__enter__()
    assert attention() == (False, False, True)
    one.__exit__(None, None, None)  # The one that began first ends first.
    assert attention() == (False, False, True)
    other.__exit__(None, None, None)
    assert attention() == before


def test_a_setting_that_cannot_be_made_is_held_by_nobody():
    tries = []

    @contextmanager
    def setting():
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError
        yield

    shared = Shared(setting)
    with pytest.raises(RuntimeError), shared():
        pass
    with shared():
        pass
    assert len(tries) == 2


def test_operators_made_in_two_threads_at_once_leave_the_kernels_of_attention():
    before, x = attention(), torch.randn(2, 3, 4)
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def make(entered, wait):
        def fn(p, x):
            entered.set()
            wait.wait(10)
            y = scaled_dot_product_attention(x * p["w"], x, x)
            return torch.distributions.Normal(y, 1.0)

        FisherOperator.from_function(fn, {"w": torch.ones(4)}, x, backend="graph")

    first = threading.Thread(target=lambda: (make(first_in, second_in), first_out.set()))
    second = threading.Thread(target=make, args=(second_in, first_out))
    first.start()
    first_in.wait(10)
    second.start()
    first.join()
    second.join()
    assert attention() == before
