"""The autoencoder and the language model in their short form."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits

from examples import Outcome, check_output, load, run
from trustregion import Status

PLATEAU = 4.69  # the squared error of the mean image, the same for all networks that ignore theirs


STEPS = 10


def train(name: str) -> Any:
    autoencoder = load("autoencoder")
    return load("race").train(autoencoder.make_task, autoencoder.METHODS[name], 0.0, 0, STEPS, 0.0)


@pytest.fixture(scope="module")
def hessian_free() -> Any:
    return train("Hessian-free")


def test_the_plateau_is_the_error_of_the_mean_image() -> None:
    images = torch.tensor(load_digits(return_X_y=True)[0] / 16)
    assert (images - images.mean(0)).square().sum(1).mean().item() == pytest.approx(
        PLATEAU, abs=0.005
    )


def test_hessian_free_leaves_the_plateau_within_a_few_steps(hessian_free: Any) -> None:
    assert hessian_free.rows[0][3] > PLATEAU
    assert hessian_free.rows[-1][3] < 0.8 * PLATEAU


def test_hessian_free_lowers_the_loss_in_each_step(hessian_free: Any) -> None:
    losses = [row[2] for row in hessian_free.rows]
    assert len(losses) == STEPS + 1
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_its_damping_moves_by_three_halves(hessian_free: Any) -> None:
    dampings = [info.damping for info in hessian_free.infos]
    factors = {round(b / a, 6) for a, b in pairwise(dampings)}
    assert factors <= {1.0, round(2 / 3, 6), 1.5}
    assert len(factors) > 1


def test_its_solves_end_by_martens_rule(hessian_free: Any) -> None:
    # the rule looks at least ten iterations back
    assert all(10 < info.cg_iterations < 250 for info in hessian_free.infos)


def test_kfac_shortens_its_solves(hessian_free: Any) -> None:
    last = [
        sum(info.cg_iterations for info in run.infos[-3:])
        for run in (hessian_free, train("Hessian-free, plain"))
    ]
    assert last[0] < 0.8 * last[1]  # 85 against 131


@pytest.mark.slow
def test_the_autoencoder_saves_its_plot_and_prints_its_table(tmp_path: Path) -> None:
    check_output(run("autoencoder", tmp_path, steps=1, seeds=1))


BUDGET = 0.03


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run(
        "charlm",
        tmp_path_factory.mktemp("plots"),
        # each rate takes the time of ours once more, and each end is measured on so many sequences
        constants={"ADAM_LRS": (0.001,), "NEW": 256},
        pretraining=80,
        steps=6,
        sequences=20,
        budgets=(BUDGET,),
        coefficients=(0.5,),
        seeds=1,
    )


def ours(tuned: Outcome) -> Any:
    ((found,),) = tuned.runs["NaturalTrustRegion"]
    return found


@pytest.mark.slow
def test_fine_tuning_raises_the_reward(tuned: Outcome) -> None:
    found = ours(tuned)
    assert found.rows[0][3] == pytest.approx(0, abs=1e-6)  # float32
    assert found.rows[-1][2] > found.rows[0][2] + 0.03


def test_the_kl_of_what_is_written_next_stays_near_the_budget(tuned: Outcome) -> None:
    # the budget is kept on the sequences of the step; 20 new ones have another mean
    found = ours(tuned)
    assert max(row[3] for row in found.rows) < 1.5 * BUDGET
    assert found.rows[-1][3] > 0.5 * BUDGET


def test_on_its_own_sequences_every_step_keeps_the_budget_and_the_ball(tuned: Outcome) -> None:
    infos = ours(tuned).infos
    assert len(infos) == 6
    assert all(info.kl <= tuned.example.DELTA for info in infos)
    accepted = [info for info in infos if info.status is Status.ACCEPTED]
    assert len(accepted) >= 3
    assert all(constraint <= 0 for info in accepted for constraint in info.constraints)
    assert all(info.new_loss <= info.loss for info in accepted)


def test_adam_pays_for_the_kl_and_gets_the_same_time(tuned: Outcome) -> None:
    ((adam,),) = tuned.runs["Adam"]
    assert adam.lr in tuned.example.ADAM_LRS
    assert adam.rows[-1][1] >= ours(tuned).rows[-1][1]
    assert adam.rows[-1][2] > adam.rows[0][2]


def test_the_language_model_saves_its_plot_and_prints_its_table(tuned: Outcome) -> None:
    assert tuned.plot.read_bytes().startswith(b"\x89PNG")
    assert "pre-trained" in tuned.stdout
    assert "vowels" in tuned.stdout
    assert tuned.stderr == ""
