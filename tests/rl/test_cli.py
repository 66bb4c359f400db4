"""The command line as a user meets it."""

import json

import gymnasium
import numpy as np
import pytest
from PIL import Image

from rl import TRPO
from rl.algorithms import ALGORITHMS
from rl.run.cli import main
from toys import Clock

TINY = ["--n-envs", "4", "--steps-per-update", "128", "--hidden", "8", "--no-progress"]


def train(out, *arguments, env="CartPole-v1", steps=400):
    return main(
        ["train", env, "--total-timesteps", str(steps), "--out", str(out), *TINY, *arguments]
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train(out, "--eval-episodes", "3") == 0
    return out


def test_train_leaves_a_run_folder(run):
    files = {p.name: p.stat().st_size for p in run.iterdir()}
    assert set(files) == {"config.json", "progress.csv", "checkpoint.zip", "learning_curve.png"}
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((run / "config.json").read_text())
    assert (config["env_id"], config["n_envs"], config["hidden"]) == ("CartPole-v1", 4, [8])
    assert len((run / "progress.csv").read_text().splitlines()) >= 4


def test_train_prints_a_table_and_a_summary(tmp_path, capsys):
    assert train(tmp_path / "run", "--eval-episodes", "2", "--log-every", "2") == 0
    printed = capsys.readouterr().out
    header = next(line for line in printed.splitlines() if "vf loss" in line)
    rows = [line for line in printed.splitlines() if line.endswith("accepted") and "KL" not in line]
    assert len(rows) == 2  # of four updates
    assert {len(row) for row in (header, *rows)} == {80}
    for words in ("learning curve", "steps per second", "of delta = 0.01", "over 2 episodes"):
        assert words in printed


def test_runs_get_a_folder_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "CartPole-v1", "--total-timesteps", "100", *TINY]) == 0
    (folder,) = (tmp_path / "runs" / "CartPole-v1").iterdir()
    assert folder.name.startswith("trpo-seed0-")
    assert f"runs/CartPole-v1/{folder.name}" in capsys.readouterr().out


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_algorithm_trains_and_is_found_again(tmp_path, capsys, algo):
    out = tmp_path / "run"
    assert train(out, "--algo", algo, "--eval-episodes", "2") == 0
    name = ALGORITHMS[algo].__name__
    printed = capsys.readouterr().out
    assert f"{name} on 4 x CartPole-v1, by the vectorised CartPoleVectorEnv" in printed
    assert main(["eval", str(out), "--episodes", "2"]) == 0
    assert f"{name} on CartPole-v1 after" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["algorithm"] == algo


def test_options_are_those_of_the_algorithm(tmp_path, capsys):
    assert train(tmp_path / "run", "--algo", "ppo", "--clip", "0.1", "--eval-episodes", "1") == 0
    with pytest.raises(SystemExit):
        train(tmp_path / "other", "--clip", "0.1")  # trpo has none
    with pytest.raises(SystemExit):
        main(["train", "CartPole-v1", "--algo", "tpro"])
    assert "invalid choice: 'tpro'" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["folder", "file"])
def test_eval_takes_a_run_or_a_checkpoint(run, capsys, what):
    path = run if what == "folder" else run / "checkpoint.zip"
    assert main(["eval", str(path), "--episodes", "3"]) == 0
    first = capsys.readouterr().out
    assert "over 3 episodes" in first
    assert main(["eval", str(path), "--episodes", "3"]) == 0
    assert capsys.readouterr().out == first


def refused(capsys, code, words):
    captured = capsys.readouterr()
    assert code == 1
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1  # one line
    assert words in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("env", "arguments", "words"),
    [
        ("NoSuch-v1", [], "cannot make environment 'NoSuch-v1'"),
        ("CartPole-v99", [], "v99"),
        ("CartPole-v1", ["--n-envs", "3"], "does not divide"),
        ("CartPole-v1", ["--eval-episodes", "0"], "--eval-episodes must be at least 1"),
        ("CartPole-v1", ["--total-timesteps", "0"], "--total-timesteps"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, env, arguments, words):
    out = tmp_path / "run"
    refused(capsys, train(out, *arguments, env=env), words)
    assert not out.exists()


def test_an_option_out_of_range_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        train(tmp_path / "run", "--delta", "0")
    assert "delta must be a positive, finite number, got 0.0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_existing_run_folder_is_kept(run, capsys):
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    refused(capsys, train(run), "already exists and is kept as it is")
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_bad_checkpoints_are_one_line(run, tmp_path, capsys):
    refused(capsys, main(["eval", str(tmp_path / "absent")]), "no checkpoint at")
    refused(capsys, main(["eval", str(tmp_path)]), "no checkpoint at")
    cut = tmp_path / "cut.zip"
    cut.write_bytes((run / "checkpoint.zip").read_bytes()[:1000])
    refused(capsys, main(["eval", str(cut)]), "truncated, damaged or of another program")
    refused(capsys, main(["eval", str(run / "progress.csv")]), "another program")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--detla", "0.1"], "--delta"), (["--gamma", "2"], "gamma must lie"), (["--seed", "x"], "x")],
)
def test_usage_errors_exit_with_two_and_say_why(tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        train(tmp_path / "run", *arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_error_in_training_keeps_what_was_learnt(tmp_path, capsys, monkeypatch):
    updates = []

    def failing(self, rollout):
        updates.append(1)
        if len(updates) == 3:
            raise ValueError("the simulator broke")
        return update(self, rollout)

    update = TRPO.update
    monkeypatch.setattr(TRPO, "update", failing)
    assert train(tmp_path / "run") == 1
    assert capsys.readouterr().err == "error: the simulator broke\n"
    assert TRPO.load(tmp_path / "run" / "checkpoint.zip").iterations == 2


def test_a_run_of_one_update_without_a_whole_episode_has_a_plot(tmp_path):
    assert train(tmp_path / "run", "--steps-per-update", "8", steps=1) == 0
    assert (tmp_path / "run" / "learning_curve.png").stat().st_size > 5000


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--delta", "--total-timesteps", "--out", "--gae-lambda"):
        assert option in printed


def test_plot_takes_seeds_together(run, tmp_path, capsys):
    assert train(tmp_path / "b", "--seed", "1", "--eval-episodes", "1") == 0
    assert train(tmp_path / "c", "--algo", "vpg", "--eval-episodes", "1") == 0
    capsys.readouterr()
    out = tmp_path / "curves.png"
    assert (
        main(["plot", str(run), str(tmp_path / "b"), str(tmp_path / "c"), "--out", str(out)]) == 0
    )
    assert out.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines()[:2] == [
        "trpo on CartPole-v1: 2 runs",
        "vpg on CartPole-v1: 1 run",
    ]
    refused(capsys, main(["plot", str(tmp_path)]), "there is no ")


def test_check_says_what_would_be_used(capsys):
    assert main(["check", "CartPole-v1"]) == 0
    printed = capsys.readouterr().out
    for words in ("8 x CartPole-v1, by the vectorised", "CategoricalHead", "4 columns of float32"):
        assert words in printed
    refused(capsys, main(["check", "NoSuch-v1"]), "cannot make environment")


@pytest.mark.filterwarnings("ignore::UserWarning")  # gymnasium warns too
def test_check_of_an_environment_that_is_wrong(capsys):
    gymnasium.register("Wrong-v0", entry_point=lambda **_: Wrong())
    try:
        assert main(["check", "Wrong-v0"]) == 1
    finally:
        gymnasium.registry.pop("Wrong-v0")
    printed = capsys.readouterr().out
    assert "its checker fails" in printed
    assert "AssertionError" in printed
    assert "\x1b" not in printed


class Wrong(Clock):
    """Its observations are not of its space."""

    def __init__(self):
        super().__init__()
        self.observation_space = gymnasium.spaces.Box(5, 6, (2,))


def test_record_writes_a_video(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rl.run.video.gymnasium.make", lambda *_, **__: Film())
    out = tmp_path / "film.gif"
    assert main(["record", str(run), "--out", str(out), "--episodes", "2"]) == 0
    with Image.open(out) as film:
        assert film.n_frames == 6
        assert film.size == (40, 30)
    assert "returns         3.000, 3.000" in capsys.readouterr().out
    refused(capsys, main(["record", str(run), "--out", str(tmp_path / "film.avi")]), "as .gif")


class Film(Clock):
    """Renders its time, and observes as CartPole does."""

    def __init__(self):
        super().__init__()
        self.observation_space = gymnasium.spaces.Box(-1, 1, (4,))

    def _observation(self):
        return np.zeros(4, np.float32)

    def render(self):
        return np.full((30, 40, 3), 20 * self.time, np.uint8)
