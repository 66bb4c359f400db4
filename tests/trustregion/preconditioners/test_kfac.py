"""Kronecker factors, against loops over samples."""

import copy

import pytest
import torch
from torch import nn

import oracles
from kfac_models import FAMILIES, each_dtype, factors_of, fisher, mlp, normal, solve_dense
from trustregion import Identity, Status, cg, to_dense
from trustregion.preconditioners.kfac import KFAC


class Twice(nn.Module):
    """A layer that runs twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


EXACT = {
    "linear": (lambda: nn.Linear(3, 2), (20, 3)),
    "without a bias": (lambda: nn.Linear(3, 2, bias=False), (20, 3)),
    "one input a sample": (lambda: nn.Linear(3, 2), (1, 3)),
    "positions": (lambda: nn.Linear(3, 2), (20, 5, 3)),
    "positions without a bias": (lambda: nn.Linear(3, 2, bias=False), (20, 5, 3)),
    "four dimensions": (lambda: nn.Linear(3, 2), (6, 2, 2, 3)),
    "convolution": (lambda: nn.Conv2d(2, 3, 2), (10, 2, 4, 4)),
    "convolution without a bias": (lambda: nn.Conv2d(2, 3, 2, bias=False), (10, 2, 4, 4)),
    "convolution with a stride": (
        lambda: nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=1, dilation=(1, 2)),
        (10, 2, 5, 6),
    ),
    "circular convolution": (
        lambda: nn.Conv2d(1, 2, 3, padding="same", padding_mode="circular"),
        (10, 1, 4, 4),
    ),
}


@each_dtype
@pytest.mark.parametrize("name", list(EXACT))
def test_it_is_the_inverse_for_one_layer_with_a_constant_metric(name, dtype):
    make, shape = EXACT[name]
    model, x = make().to(dtype), torch.randn(shape, dtype=dtype)
    F = fisher(model, x)
    M = KFAC(model, samples="exact").build(F, 0.1)
    exact = solve_dense(F, 0.1)
    # condition of F + 0.1 I times the rounding of products and factors
    rtol = 1000 * torch.finfo(dtype).eps
    torch.testing.assert_close(to_dense(M).double(), exact, rtol=rtol, atol=rtol * exact.max())
    b = torch.randn(F.shape[0], dtype=dtype)
    solution = cg(F + 0.1 * Identity(len(b), dtype), b, M=M, rtol=1e-5)
    assert (solution.status, solution.iterations) == (Status.CONVERGED, 1)


def test_inputs_that_are_not_contiguous_keep_their_bias():
    model = nn.Linear(3, 2).double()
    x = torch.randn(4, 20, 3, dtype=torch.float64).transpose(0, 1)
    F = fisher(model, x)
    M = KFAC(model, samples="exact").build(F, 0.1)
    torch.testing.assert_close(to_dense(M), solve_dense(F, 0.1))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_factors_are_those_of_a_loop_over_samples(family):
    model = mlp(3, 5, 4, 4).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    kfac = KFAC(model, samples="exact")
    kfac.build(fisher(model, x, FAMILIES[family]), 0.1)
    expected = oracles.kronecker_factors(model, FAMILIES[family], x)
    for found, wanted in zip(factors_of(kfac), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_factors_at_several_positions_are_those_of_a_loop():
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(5, 3, 2, dtype=torch.float64)
    kfac = KFAC(model, samples="exact")
    kfac.build(fisher(model, x, FAMILIES["categorical"]), 0.1)
    expected = oracles.kronecker_factors(model, FAMILIES["categorical"], x)
    for found, wanted in zip(factors_of(kfac), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_drawn_factors_are_right_on_average(family):
    model = mlp(3, 4, 4).double()
    x = torch.randn(3, 3, dtype=torch.float64)
    kfac = KFAC(model, samples=1000, seed=1)
    kfac.build(fisher(model, x, FAMILIES[family]), 0.1)
    expected = oracles.kronecker_factors(model, FAMILIES[family], x)
    for (A, G), (wanted_A, wanted_G) in zip(factors_of(kfac), expected, strict=True):
        torch.testing.assert_close(A, wanted_A)
        # the noise of 3000 signs is about two percent
        torch.testing.assert_close(G, wanted_G, rtol=0, atol=0.1 * wanted_G.abs().max().item())


def test_factors_of_a_convolution_are_those_of_its_patches():
    torch.manual_seed(3)
    conv = nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2)).double()
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(3 * 3 * 5, 2).double())
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    kfac = KFAC(model, samples="exact")
    kfac.build(fisher(model, x), 0.1)
    padded = nn.functional.pad(x, (2, 2, 1, 1))
    y = conv(x)
    A, rows = 0.0, 0
    for image in padded:
        for i in range(y.shape[2]):
            for j in range(y.shape[3]):
                patch = image[:, 2 * i : 2 * i + 2, j : j + 5 : 2].reshape(-1)
                a = torch.cat([patch, patch.new_ones(1)])
                A, rows = A + torch.outer(a, a), rows + 1
    G = 0.0
    for image in x:

        def head(shift, image=image):
            return model[1:]((conv(image) + shift).unsqueeze(0)).squeeze(0)

        J = torch.autograd.functional.jacobian(head, torch.zeros_like(y[0])).flatten(2)
        G = G + torch.einsum("ajt,akt->jk", J, J) / 0.5**2
    found_A, found_G = factors_of(kfac)[0]
    torch.testing.assert_close(found_A, A / rows)
    torch.testing.assert_close(found_G, G / len(x))


def test_large_images_are_unfolded_in_parts(monkeypatch):
    conv = nn.Conv2d(2, 3, 3).double()
    F = fisher(conv, torch.randn(7, 2, 6, 6, dtype=torch.float64))
    whole, parts = KFAC(conv), KFAC(conv)
    whole.build(F, 0.1)
    monkeypatch.setattr("trustregion.preconditioners.kfac_layers._CHUNK", 1500)
    parts.build(F, 0.1)
    torch.testing.assert_close(factors_of(parts), factors_of(whole))


def test_a_layer_that_runs_twice_sums_over_its_rows():
    model = Twice().double()
    x = torch.randn(6, 3, dtype=torch.float64)
    kfac = KFAC(model, samples="exact")
    kfac.build(fisher(model, x), 0.1)
    first, second = copy.deepcopy(model.layer), copy.deepcopy(model.layer)
    apart = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), model.head)
    (A1, G1), (A2, G2), _ = oracles.kronecker_factors(apart, normal, x)
    A, G = factors_of(kfac)[0]
    torch.testing.assert_close(A, (A1 + A2) / 2)
    torch.testing.assert_close(G, G1 + G2)
