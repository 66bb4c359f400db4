"""Curve fitting and variational inference in their short form."""

import math
from typing import Any

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from examples import Outcome, check_output, load, run

curve_fitting = load("curve_fitting")
PROBLEMS, OURS = curve_fitting.PROBLEMS, "Levenberg-Marquardt"
EASY = ("Misra1a", "BoxBOD", "Rat43")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run("curve_fitting", tmp_path_factory.mktemp("plots"), names=EASY)


def first_guess(problem: Any, start: int) -> torch.Tensor:
    return curve_fitting.numbers(problem.starts[start - 1])


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_data_have_the_certified_sum_of_squares(name: str) -> None:
    problem = PROBLEMS[name]
    assert len(problem.x) == len(problem.y) > len(problem.certified)
    assert {len(start) for start in problem.starts} == {len(problem.certified)}
    assert curve_fitting.verified(problem) < 1e-10


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_mistyped_last_digit_is_noticed(name: str) -> None:
    problem = PROBLEMS[name]
    digit = 10.0 ** -max(len(repr(v).partition(".")[2]) for v in problem.y)
    wrong = problem._replace(y=(problem.y[0] + digit, *problem.y[1:]))
    assert curve_fitting.verified(wrong) > 1e-10


def test_digits_are_those_of_the_worst_parameter() -> None:
    problem = PROBLEMS["MGH10"]
    certified = curve_fitting.numbers(problem.certified)
    off = certified * (1 + curve_fitting.numbers((1e-9, -1e-5, 0.0)))
    assert curve_fitting.digits(off, problem) == pytest.approx(5, abs=1e-3)
    assert curve_fitting.digits(certified, problem) == 11
    assert curve_fitting.digits(-certified, problem) == 0
    assert curve_fitting.digits(math.nan * certified, problem) == 0


@pytest.mark.parametrize("start", [1, 2])
@pytest.mark.parametrize("name", EASY)
def test_easy_problems_are_solved(fitted: Outcome, name: str, start: int) -> None:
    fit = fitted.runs[OURS][name, start]
    assert fit.digits >= curve_fitting.ENOUGH
    assert fit.steps < 60
    assert fit.products <= fit.steps * len(PROBLEMS[name].certified)
    assert fit.evaluations > fit.steps


@pytest.mark.parametrize(("name", "start"), [("MGH17", 2), ("MGH09", 2), ("Thurber", 1)])
def test_harder_ones_too(name: str, start: int) -> None:
    problem = PROBLEMS[name]
    fit = curve_fitting.ours(problem, first_guess(problem, start))
    assert fit.digits >= curve_fitting.ENOUGH


def test_failures_stay_in_the_table(fitted: Outcome) -> None:
    # MINPACK walks from (1, 1) to where the curve is flat in its rate
    assert fitted.runs["scipy lm"]["BoxBOD", 1].digits == 0
    (row,) = (line for line in fitted.stdout.splitlines() if line.startswith("BoxBOD   1"))
    assert " 0.0 " in row
    (total,) = (line for line in fitted.stdout.splitlines() if line.startswith("scipy lm"))
    assert "5 of 6" in total


def test_a_fit_has_no_units() -> None:
    # a factor of two is exact, so that every step is the same
    problem = PROBLEMS["Misra1a"]
    guess = first_guess(problem, 1)
    larger = problem._replace(
        y=tuple(1024 * y for y in problem.y),
        certified=(1024 * problem.certified[0], problem.certified[1]),
    )
    fit = curve_fitting.ours(problem, guess)
    again = curve_fitting.ours(larger, guess * curve_fitting.numbers((1024.0, 1.0)))
    assert fit[1:4] == again[1:4]
    assert again.parameters.tolist() == [1024 * fit.parameters[0].item(), fit.parameters[1].item()]


def test_curve_fitting_saves_its_plot_and_prints_its_table(fitted: Outcome) -> None:
    check_output(fitted)
    assert "reproduced to 10" in fitted.stdout


STEPS = 10


@pytest.fixture(scope="module")
def variational() -> Any:
    return load("variational")


@pytest.fixture(scope="module")
def inferred(variational: Any) -> Any:
    method = variational.METHODS["NaturalTrustRegion"]
    return load("race").train(variational.make_task, method, 0.0, 0, STEPS, 0.0)


def laplace(data: Any) -> float:
    """Return the log evidence by Laplace's method: Newton to the mode, and the curvature there."""
    w, eye = torch.zeros_like(data.x[0]), torch.eye(data.x.shape[1]).to(data.x)

    def hessian() -> torch.Tensor:
        p = (data.x @ w).sigmoid()
        return data.x.mT @ (data.x * (p * (1 - p))[:, None]) + eye

    for _ in range(30):
        gradient = data.x.mT @ ((data.x @ w).sigmoid() - data.y) + w
        w = w - torch.linalg.solve(hessian(), gradient)
    fit = torch.nn.functional.logsigmoid((2 * data.y - 1) * (data.x @ w)).sum()
    return (fit - 0.5 * w.square().sum() - 0.5 * torch.logdet(hessian())).item()


def test_the_bound_of_the_prior_is_its_mean_log_likelihood(variational: Any) -> None:
    torch.manual_seed(0)
    train, _ = variational.split()
    q, noise = variational.Posterior(31)(), torch.randn(50, 31, dtype=torch.float64)
    signs = 2 * train.y - 1
    expected = torch.nn.functional.logsigmoid(signs * (noise @ train.x.mT)).sum(1).mean()
    assert variational.elbo(q, noise, train).item() == pytest.approx(expected.item(), rel=1e-12)


def test_without_data_the_bound_is_minus_the_divergence(variational: Any) -> None:
    torch.manual_seed(0)
    scale = torch.rand(4, 4, dtype=torch.float64).tril() + torch.eye(4)
    q = MultivariateNormal(torch.rand(4, dtype=torch.float64), scale_tril=scale)
    nothing = variational.Data(torch.zeros(0, 4).double(), torch.zeros(0).double())
    cov = scale @ scale.mT
    kl = 0.5 * (cov.trace() + q.loc.square().sum() - 4 - torch.logdet(cov))
    bound = variational.elbo(q, torch.randn(9, 4).double(), nothing)
    assert bound.item() == pytest.approx(-kl.item(), rel=1e-6)


def test_the_bound_comes_near_the_evidence_within_ten_steps(
    variational: Any, inferred: Any
) -> None:
    torch.manual_seed(0)
    evidence = laplace(variational.split()[0])  # that of seed 0
    assert -inferred.rows[0][2] < evidence - 300
    assert evidence - 3 < -inferred.rows[-1][2] < evidence + 1


def test_every_step_lowers_the_loss_within_the_ball(variational: Any, inferred: Any) -> None:
    assert len(inferred.infos) == STEPS
    assert all(info.accepted and info.new_loss < info.loss for info in inferred.infos)
    assert all(0 < info.kl <= variational.DELTA for info in inferred.infos)
    assert all(info.kl > 0.8 * variational.DELTA for info in inferred.infos[:2])


def test_the_ball_is_one_of_beliefs(variational: Any) -> None:
    torch.manual_seed(0)
    task = variational.make_task()
    updates = variational.natural(task, 0.0)
    for _ in range(3):
        with torch.no_grad():
            q = task.model()
            before = MultivariateNormal(q.loc.clone(), scale_tril=q.scale_tril.clone())
            info = next(updates)
            moved = kl_divergence(before, task.model()).item()
        assert info.kl == pytest.approx(moved, rel=1e-6)


def test_test_data_are_predicted_better_than_by_the_prior(inferred: Any) -> None:
    first, last = inferred.rows[0][4], inferred.rows[-1][4]
    assert first < -0.5
    assert last > -0.1


def test_variational_saves_its_plot_and_prints_its_table(tmp_path: Any) -> None:
    outcome = run("variational", tmp_path, steps=1, seeds=1)
    check_output(outcome)
    assert "seconds until within" in outcome.stdout
    assert all(
        run.rows[0][2:] == outcome.runs["L-BFGS, 20 per step"][0].rows[0][2:]
        for (run,) in outcome.runs.values()
    )
    assert min(run.rows[-1][-1] for (run,) in outcome.runs.values()) == 0
