"""The command line as a user meets it."""

import json
import re
import shutil
from contextlib import redirect_stdout
from io import StringIO

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.classic_control import CartPoleEnv
from PIL import Image

from rl import TRPO
from rl.algorithms import ALGORITHMS
from rl.run.cli import main
from toys import Clock

COMMANDS = ("train", "eval", "plot", "record", "check")
TINY = ["--n-envs", "4", "--steps-per-update", "128", "--hidden", "8", "--no-progress"]


def train(out, *arguments, env="CartPole-v1", steps=400):
    return main(
        ["train", env, "--total-timesteps", str(steps), "--out", str(out), *TINY, *arguments]
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of a run of four updates, and what was printed."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with redirect_stdout(StringIO()) as printed:
        assert train(out, "--eval-episodes", "3", "--log-every", "2") == 0
    return out, printed.getvalue()


@pytest.fixture
def run(trained):
    return trained[0]


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_fits_80_columns(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    printed = capsys.readouterr().out
    assert caught.value.code == 0
    assert max(map(len, printed.splitlines())) <= 80
    assert "None" not in re.sub(r"\{None\}\||\(default: None\)|None to", "", printed)
    if arguments[0] in ("train", "check"):
        assert "--algo {" + ",".join(ALGORITHMS) + "}" in printed
        assert all(option in printed for option in ("--delta", "--gae-lambda", "--preset"))
    if arguments[0] == "--help":
        assert re.findall(r"^  (\w+)", printed.split("commands:")[1], re.M) == list(COMMANDS)


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert re.fullmatch(r"torch-trustregion \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "E-v0", "--detla", "3"], ["--delta FLOAT", "python -m rl train --help"]),
        (["eval", "run", "--episode", "3"], ["--episodes INT", "python -m rl eval --help"]),
        (["trian"], ["'trian'", "'train'"]),
        ([], ["COMMAND"]),
        (["plot", "run", "--algo", "ppo"], ["--algo"]),
    ],
)
def test_a_wrong_word_is_answered_by_the_near_ones(capsys, arguments, expected):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert all(word in printed for word in expected)


# -- runs


def test_a_run_is_a_folder_a_table_and_a_summary(trained):
    run, printed = trained
    names = {"config.json", "progress.csv", "checkpoint.zip", "best.zip", "learning_curve.png"}
    assert {path.name for path in run.iterdir()} - {".lock"} == names
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((run / "config.json").read_text())
    assert (config["env_id"], config["n_envs"], config["hidden"]) == ("CartPole-v1", 4, [8])
    assert len((run / "progress.csv").read_text().splitlines()) == 5
    header = next(line for line in printed.splitlines() if "vf loss" in line)
    rows = [line for line in printed.splitlines() if line.endswith("accepted") and "KL" not in line]
    assert len(rows) == 2  # of four updates
    assert {len(row) for row in (header, *rows)} == {80}
    for words in ("learning curve", "steps per second", "of delta = 0.01", "over 3 episodes"):
        assert words in printed
    assert "TRPO on 4 x CartPole-v1, by the vectorised CartPoleVectorEnv" in printed


def test_options_are_those_of_the_algorithm(tmp_path, capsys):
    assert main(["check", "CartPole-v1", "--algo", "ppo", "--clip", "0.1"]) == 0
    assert "clip=0.1" in capsys.readouterr().out
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
    [
        (["--delta", "0"], "delta must be a positive, finite number, got 0.0"),
        (["--gamma", "2"], "gamma must lie"),
        (["--seed", "x"], "x"),
    ],
)
def test_usage_errors_exit_with_two_and_say_why(tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        train(tmp_path / "run", *arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["eval", "record"])
def test_an_agent_of_a_function_is_told_its_environment(tmp_path, capsys, command):
    path = tmp_path / "agent.zip"
    TRPO(CartPoleEnv, n_envs=2, steps_per_update=64, hidden=(4,)).save(path)
    assert main([command, str(path)]) == 1
    err = capsys.readouterr().err
    assert err == f"error: {path} does not name its environment: pass --env ENV_ID\n"
    assert main(["eval", str(path), "--env", "CartPole-v1", "--episodes", "2"]) == 0
    assert "TRPO on CartPole-v1 after 0 steps" in " ".join(capsys.readouterr().out.split())
    assert main([command, str(path), "--env", "NoSuch-v0"]) == 1
    assert "'NoSuch-v0'" in capsys.readouterr().err


def test_a_run_of_one_update_without_a_whole_episode_has_a_plot(tmp_path):
    assert train(tmp_path / "run", "--steps-per-update", "8", steps=1) == 0
    assert (tmp_path / "run" / "learning_curve.png").stat().st_size > 5000


def test_plot_takes_seeds_together(run, tmp_path, capsys):
    for name, changes in (("b", {"seed": 1}), ("c", {"algorithm": "vpg"})):
        shutil.copytree(run, tmp_path / name)
        config = json.loads((run / "config.json").read_text()) | changes
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    out = tmp_path / "curves.png"
    runs = [str(folder) for folder in (run, tmp_path / "b", tmp_path / "c")]
    assert main(["plot", *runs, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["trpo on CartPole-v1: 2 runs", "vpg on CartPole-v1: 1 run"]
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
