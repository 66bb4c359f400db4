"""The examples in their short form: what they claim must hold after a few steps already."""

import contextlib
import importlib.util
import io
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "docs" / "examples"
STEPS = 8


class Outcome(NamedTuple):
    example: ModuleType
    runs: dict[str, Any]
    plot: Path
    stdout: str
    stderr: str

    @property
    def ours(self) -> Any:
        (run,) = self.runs["NaturalTrustRegion"]
        return run

    @property
    def adams(self) -> list[Any]:
        return [run for name, (run,) in self.runs.items() if name != "NaturalTrustRegion"]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["classifier", "regressor"])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    example = load(request.param)
    plot = tmp_path_factory.mktemp("plots") / "plot.png"
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        runs = example.main(steps=STEPS, seeds=1, plot=plot, quiet=True)
    return Outcome(example, runs, plot, stdout.getvalue(), stderr.getvalue())


def test_the_training_loss_falls(outcome: Outcome) -> None:
    first, last = outcome.ours.rows[0][2], outcome.ours.rows[-1][2]
    assert last < first - 0.5


def test_every_step_is_taken_inside_the_ball_and_lowers_the_loss(outcome: Outcome) -> None:
    infos = outcome.ours.infos
    assert len(infos) == STEPS
    assert all(info.accepted for info in infos)
    assert all(0 < info.kl <= outcome.example.DELTA for info in infos)
    assert all(info.new_loss < info.loss for info in infos)


def test_the_recorded_losses_are_those_of_the_optimizer(outcome: Outcome) -> None:
    recorded = [row[2] for row in outcome.ours.rows[1:]]
    assert recorded == pytest.approx([info.new_loss for info in outcome.ours.infos], abs=1e-5)


def test_ours_is_below_adam_after_as_many_steps(outcome: Outcome) -> None:
    at_steps = [run.rows[STEPS] for run in outcome.adams]
    assert all(row[0] == STEPS for row in at_steps)
    assert outcome.ours.rows[STEPS][2] < min(row[2] for row in at_steps)


def test_adam_starts_from_the_same_weights_and_gets_the_same_time(outcome: Outcome) -> None:
    ours = outcome.ours.rows
    for run in outcome.adams:
        assert run.lr in outcome.example.ADAM_LRS
        assert run.rows[0] == ours[0]
        assert run.rows[-1][1] >= ours[-1][1]


def test_it_saves_the_plot_prints_the_table_and_is_quiet(outcome: Outcome) -> None:
    content = outcome.plot.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000
    assert all(outcome.stdout.count(name) == 2 for name in outcome.runs)
    assert outcome.stderr == ""


def test_a_run_repeats_itself(outcome: Outcome, tmp_path: Path) -> None:
    again = outcome.example.main(steps=2, seeds=1, plot=tmp_path / "plot.png", quiet=True)
    (run,) = again["NaturalTrustRegion"]
    expected = [row[2:] for row in outcome.ours.rows[:3]]
    assert [row[2:] for row in run.rows] == expected


# torch 2.13 uses its own deprecated torch.jit.script when it first needs a jvp
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_the_ensemble_steps_together_as_its_members_do_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    threads = torch.get_num_threads()
    result = load("ensemble").main(steps=6, members=5, quiet=True)
    torch.set_num_threads(threads)
    assert result["loss at the last"] < 0.5 * result["loss at the first step"]
    assert result["values differ by"] < 1e-2  # float32, ten iterations
    assert "times faster" in capsys.readouterr().out
