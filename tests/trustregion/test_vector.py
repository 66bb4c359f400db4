import pytest
import torch

from trustregion.operators import ParameterVector


def params():
    return [torch.randn(2, 3), torch.randn(3, 4).t(), torch.randn(()), torch.empty(0)]


def test_values_and_assign_round_trip_bit_for_bit():
    ps = params()
    ps[0][0, 0] = -0.0
    ps[0][0, 1] = float("nan")
    vector = ParameterVector(ps)
    kept, copies = vector.values(), [p.clone() for p in ps]
    vector.assign(torch.zeros(vector.numel))
    assert all((p == 0).all() for p in ps)
    vector.assign(kept)
    for p, copy in zip(ps, copies, strict=True):
        assert torch.equal(p.contiguous().view(torch.int32), copy.contiguous().view(torch.int32))


def test_unravel_inverts_ravel_for_noncontiguous_parameters():
    ps = params()
    vector = ParameterVector(ps)
    for p, part in zip(ps, vector.unravel(vector.ravel(ps)), strict=True):
        assert torch.equal(p, part)


def test_ravel_reads_none_as_zeros():
    ps = params()
    flat = ParameterVector(ps).ravel([None, ps[1], None, None])
    assert torch.equal(flat, torch.cat([torch.zeros(6), ps[1].reshape(-1), torch.zeros(1)]))


def test_values_is_a_copy():
    p = torch.ones(2)
    kept = ParameterVector([p]).values()
    p.zero_()
    assert torch.equal(kept, torch.ones(2))


def test_the_first_nonfinite_parameter_is_named():
    vector = ParameterVector([torch.ones(2), torch.ones(3)], ["actor", "critic"])
    assert vector.name_nonfinite(torch.ones(5)) is None
    bad = torch.ones(5)
    bad[3] = float("inf")
    assert vector.name_nonfinite(bad) == "critic"


tied = torch.zeros(3)


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ([], ValueError, "empty"),
        (torch.zeros(2), TypeError, "iterable"),
        ([3.0], TypeError, "must be a tensor"),
        ([torch.zeros(2, dtype=torch.float16)], TypeError, "autocast"),
        ([torch.zeros(2, dtype=torch.complex64)], TypeError, "view_as_real"),
        ([torch.zeros(2), torch.zeros(2, dtype=torch.float64)], ValueError, "one dtype"),
        ([tied, tied], ValueError, "same memory"),
        ([torch.zeros(2).expand(3, 2)], ValueError, "expanded view"),
        ([tied, tied.detach()], ValueError, "same memory"),
    ],
)
def test_wrong_parameters_are_refused_in_words(params, error, words):
    with pytest.raises(error, match=words):
        ParameterVector(params)
