"""The examples in their short form: what they claim must hold after a few steps already."""

from pathlib import Path
from typing import Any

import pytest
import torch

from examples import Outcome, check_output, load, run

STEPS = 8
OURS = ("NaturalTrustRegion", "NewtonTrustRegion")


@pytest.fixture(scope="module", params=["classifier", "regressor"])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run(request.param, tmp_path_factory.mktemp("plots"), steps=STEPS, seeds=1)


def only(outcome: Outcome, name: str) -> Any:
    (found,) = outcome.runs[name]
    return found


def test_ours_race_against_lbfgs_and_adam(outcome: Outcome) -> None:
    families = {name.split(",")[0] for name in outcome.runs}
    assert families == {*OURS, "L-BFGS", "Adam"}


@pytest.mark.parametrize("name", [*OURS, "L-BFGS, 20 per step"])
def test_the_training_loss_falls(outcome: Outcome, name: str) -> None:
    rows = only(outcome, name).rows
    assert rows[STEPS][2] < rows[0][2] - 0.5


def test_every_step_is_taken_inside_the_ball_and_lowers_the_loss(outcome: Outcome) -> None:
    infos = only(outcome, "NaturalTrustRegion").infos
    assert len(infos) == STEPS
    assert all(info.accepted for info in infos)
    assert all(0 < info.kl <= outcome.example.DELTA for info in infos)
    assert all(info.new_loss < info.loss for info in infos)


def test_newton_never_ends_a_step_with_a_higher_loss(outcome: Outcome) -> None:
    infos = only(outcome, "NewtonTrustRegion").infos
    assert len(infos) >= STEPS
    assert all(info.new_loss <= info.loss for info in infos)


@pytest.mark.parametrize("name", OURS)
def test_the_recorded_losses_are_those_of_the_optimizer(outcome: Outcome, name: str) -> None:
    found = only(outcome, name)
    recorded = [row[2] for row in found.rows[1 : STEPS + 1]]
    # float32, and the mean is taken by another kernel
    assert recorded == pytest.approx([info.new_loss for info in found.infos[:STEPS]], abs=1e-5)


@pytest.mark.parametrize("name", OURS)
def test_ours_is_below_adam_after_as_many_steps(outcome: Outcome, name: str) -> None:
    adams = [group[0].rows[STEPS] for key, group in outcome.runs.items() if "Adam" in key]
    assert adams
    assert all(row[0] == STEPS for row in adams)
    assert only(outcome, name).rows[STEPS][2] < min(row[2] for row in adams)


def test_all_start_from_the_same_weights_and_get_the_same_time(outcome: Outcome) -> None:
    first = only(outcome, "NaturalTrustRegion").rows
    for name, (found,) in outcome.runs.items():
        lrs = outcome.example.METHODS[name].lrs
        assert found.lr in lrs if lrs else found.lr is None
        assert found.rows[0] == first[0]
        assert found.rows[-1][1] >= first[-1][1]


def test_it_saves_the_plot_prints_the_table_and_is_quiet(outcome: Outcome) -> None:
    check_output(outcome)


@pytest.mark.parametrize("name", OURS)
def test_a_run_repeats_itself(outcome: Outcome, name: str) -> None:
    race = load("race")
    found, method = only(outcome, name), outcome.example.METHODS[name]
    # the task is rebuilt from the seed, as in the race
    again = race.train(outcome.example.make_task, method, 0.0, 0, 2, 0.0)
    assert [row[2:] for row in again.rows] == [row[2:] for row in found.rows[:3]]


def test_of_several_learning_rates_the_one_with_the_lowest_loss_is_shown() -> None:
    race = load("race")

    def task() -> Any:
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(model.weight)

        def loss(batch: Any = None) -> tuple[torch.Tensor, None]:
            return model.weight.square().sum(), None

        return race.Task(model, 1, loss, lambda: (loss()[0].item(),))

    def gradient(task: Any, lr: float) -> Any:
        return race.descend(torch.optim.SGD(task.model.parameters(), lr), task)

    method = race.Method(gradient, "", (0.01, 0.5, 3.0))  # 0.5 is Newton's step, 3 diverges
    (found,) = race.race({"gradient": method}, task, 3, 1, True)["gradient"]
    assert found.lr == 0.5
    assert found.rows[1][2] == 0.0


# torch 2.13 uses its own deprecated torch.jit.script when it first needs a jvp
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_the_ensemble_steps_together_as_its_members_do_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads, plot = torch.get_num_threads(), tmp_path / "plot.png"
    result = load("ensemble").main(steps=6, members=5, plot=plot, quiet=True)
    torch.set_num_threads(threads)
    assert result["loss at the last"] < 0.5 * result["loss at the first step"]
    assert result["values differ by"] < 1e-2  # float32, ten iterations
    assert "times faster" in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")
