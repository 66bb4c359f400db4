"""The parts of docs/examples/poisson.py against independent ones, and the script in short."""

import math
from itertools import pairwise

import pytest
import torch
from torch.func import functional_call, hessian, jacrev, vmap

from examples import load

# torch 2.13 compiles its own rules for jvp with its own deprecated function
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")


@pytest.fixture(scope="module")
def poisson():
    return load("poisson")


def test_the_laplacian_is_the_trace_of_the_hessian(poisson):
    torch.manual_seed(0)
    ansatz, x = poisson.Ansatz(), torch.rand(20, 2, dtype=torch.float64)
    with torch.no_grad():
        H = vmap(hessian(lambda point: ansatz(point.unsqueeze(0)).squeeze(0)))(x)
        torch.testing.assert_close(ansatz.laplacian(x), H.diagonal(dim1=1, dim2=2).sum(1))


def test_the_solution_solves_it(poisson):
    x = torch.rand(20, 2, dtype=torch.float64)
    H = vmap(hessian(lambda point: poisson.solution(point.unsqueeze(0)).squeeze(0)))(x)
    expected = -2 * math.pi**2 * poisson.solution(x)
    torch.testing.assert_close(H.diagonal(dim1=1, dim2=2).sum(1), expected)
    # sin(pi) is 1e-16
    torch.testing.assert_close(poisson.solution(poisson.edges(7)), torch.zeros(28).double())


def test_the_natural_gradient_is_the_least_squares_solution(poisson):
    energy = poisson.Energy(3)
    theta = {name: p.detach() for name, p in energy.named_parameters()}
    jacobian = jacrev(lambda named: functional_call(energy, named, ()))(theta)
    J = torch.cat([block.reshape(len(block), -1) for block in jacobian.values()], dim=1)
    residuals = energy().detach()
    (direction,) = poisson.natural_gradients(energy, damped=False)
    expected = torch.linalg.lstsq(J, residuals, rcond=poisson.CUTOFF, driver="gelsd").solution
    # of what the direction does: near the cutoff its entries amplify rounding a million times
    torch.testing.assert_close(J @ direction, J @ expected, rtol=1e-6, atol=1e-8)
    damped = poisson.natural_gradients(energy, damped=True)
    for row, damping in zip(damped, poisson.DAMPINGS, strict=True):
        scale = (damping * torch.linalg.matrix_norm(J, 2)) ** 2
        system = J.T @ J + scale * torch.eye(J.shape[1], dtype=J.dtype)
        gap = system @ row - J.T @ residuals
        assert gap.norm() < 1e-8 * (J.T @ residuals).norm()


def test_many_losses_are_the_loss_of_each(poisson):
    energy = poisson.Energy(0)
    theta = torch.nn.utils.parameters_to_vector(energy.parameters()).detach()
    losses = energy.losses(torch.stack([theta, 2 * theta]))
    assert losses[0].item() == pytest.approx(energy.closure()[0].item(), rel=1e-12)
    torch.nn.utils.vector_to_parameters(2 * theta, energy.parameters())
    assert losses[1].item() == pytest.approx(energy.closure()[0].item(), rel=1e-12)


def test_the_short_form(poisson, tmp_path, capsys):
    plot = tmp_path / "poisson.png"
    runs = poisson.main(steps=3, seeds=1, times=0.2, plot=plot, quiet=True)
    assert set(runs) == set(poisson.COLOURS)
    assert [row[0] for row in runs["energy natural gradient"][0].rows] == [0, 1, 2, 3]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("\n") == 1 + len(runs)


def test_steps_lower_the_loss(poisson):
    energy = poisson.Energy(0)
    losses = [energy.closure()[0].item()]
    updates = poisson.energy_natural(energy)
    for _ in range(12):
        next(updates)
        losses.append(energy.closure()[0].item())
    assert all(after <= before for before, after in pairwise(losses))
    assert losses[-1] < 0.1 * losses[0]
