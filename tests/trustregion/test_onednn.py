"""Which library multiplies the matrices of the Jacobian products, and whether it may."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from trustregion import recorded
from trustregion.linearise import choose, linearise, onednn, prefer_onednn
from trustregion.operators import ParameterVector

needs_onednn = pytest.mark.skipif(
    recorded.onednn_linear() is None, reason="torch was built without oneDNN"
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    caches = (onednn._multiplies_as_torch, onednn._is_measured_faster, recorded.onednn_linear)
    monkeypatch.setattr(onednn, "_preferred", None)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def product(rows=700):
    torch.manual_seed(0)
    layer = nn.Linear(40, 64)
    return [layer(torch.randn(rows, 40))], ParameterVector(layer.parameters())


def uses_onednn(backend="tape", rows=700):
    J = linearise(*product(rows), backend)
    return any(isinstance(s.rule, onednn.DenseProduct) for s in J._steps)


@needs_onednn
@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # said by torch's own context manager
def test_the_choice_is_the_users():
    prefer_onednn(True)
    assert uses_onednn()
    prefer_onednn(False)
    assert not uses_onednn()
    prefer_onednn(True)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not uses_onednn()


@needs_onednn
def test_a_product_too_small_for_the_call_is_torchs():
    prefer_onednn(True)
    assert not uses_onednn(rows=500)  # 2.6 million operations


@needs_onednn
@pytest.mark.parametrize(
    ("tells", "mkl", "chosen"),
    [
        ({"cpu_name": "AMD EPYC 9755", "avx_vnni": True}, True, True),
        ({"cpu_name": "AMD EPYC 9755", "avx_vnni": True}, False, False),
        ({"cpu_name": "AMD EPYC 9654", "avx_vnni": False}, True, False),
        ({"cpu_name": "AMD EPYC 9755"}, True, False),
        ({"cpu_name": "Intel Xeon", "avx_vnni": True}, True, False),
        ({}, True, False),
    ],
)
def test_the_default_follows_the_processor(monkeypatch, tells, mkl, chosen):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: tells, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert uses_onednn() == chosen


def test_a_torch_that_does_not_tell_the_processor(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not uses_onednn()


def test_a_choice_that_is_none():
    with pytest.raises(TypeError, match="True, False or None"):
        prefer_onednn("yes")


class Operator:
    """An operator in the place of torch's, of some schema and some values."""

    def __init__(self, schema, error=0.0):
        self._schema, self.error = schema, error
        self.calls = 0

    @property
    def default(self):
        return self

    def __call__(self, x, w, row, *_):
        self.calls += 1
        out = x @ w.t()
        return (out if row is None else out + row) * (1 + self.error)


@pytest.mark.parametrize(
    ("schema", "error", "used"),
    [
        (recorded._LINEAR_POINTWISE, 0.0, True),
        (recorded._LINEAR_POINTWISE, 1e-3, False),
        (recorded._LINEAR_POINTWISE, float("nan"), False),
        (recorded._LINEAR_POINTWISE.replace("str attr, ", ""), 0.0, False),
    ],
    ids=["as known", "of wrong values", "of NaN", "of another schema"],
)
def test_the_operator_is_checked_by_schema_and_by_value(monkeypatch, schema, error, used):
    operator = Operator(schema, error)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", operator, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    prefer_onednn(True)
    assert uses_onednn() == used
    calls = operator.calls
    uses_onednn()  # the values are compared once in a process
    assert operator.calls <= calls + (4 if used else 0)


def test_an_operator_that_raises_is_not_used(monkeypatch):
    def fail(*_):
        raise RuntimeError("not on this processor")

    operator = Operator(recorded._LINEAR_POINTWISE)
    monkeypatch.setattr(Operator, "__call__", fail)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", operator, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    prefer_onednn(True)
    assert not uses_onednn()


@needs_onednn
def test_what_agreed_by_one_library_is_compared_again_by_the_other(monkeypatch):
    monkeypatch.setattr(choose, "_AGREED", set())
    prefer_onednn(False)
    assert not uses_onednn("auto")
    wrong = onednn.DenseProduct.jvp
    monkeypatch.setattr(onednn.DenseProduct, "jvp", lambda *args: wrong(*args).mul_(2))
    prefer_onednn(True)
    assert linearise(*product()).backend == "graph"


@pytest.mark.slow
def test_the_choice_is_the_same_in_each_process():
    code = (
        "from trustregion.linearise import onednn;"
        "print(onednn._is_measured_faster(), onednn._multiplies_as_torch())"
    )
    command = [sys.executable, "-c", code]
    done = [subprocess.run(command, capture_output=True, check=True).stdout for _ in range(2)]
    assert done[0] == done[1]
