"""The command line: its help, its run folders, its environments and its summary."""

import json
import re

import gymnasium
import pytest
from gymnasium.envs.classic_control import CartPoleEnv

import rl.run.cli
from rl import NPG, TRPO
from rl.algorithms import ALGORITHMS
from rl.run.cli import main
from toys import Clock

TINY = ["--n-envs", "2", "--steps-per-update", "64", "--hidden", "4", "--no-progress"]
COMMANDS = ("train", "eval", "plot", "record", "check")


class Counted(CartPoleEnv):
    """Counts the copies that are open, and keeps what each was made with."""

    open, most, made = 0, 0, []

    def __init__(self, render_mode=None, **arguments):
        super().__init__()
        Counted.open += 1
        Counted.most = max(Counted.most, Counted.open)
        Counted.made.append(arguments)

    def close(self):
        Counted.open -= 1


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    registry = {k: v for k, v in gymnasium.registry.items() if k == "CartPole-v1"}
    monkeypatch.setattr(gymnasium.envs.registration, "registry", registry)
    gymnasium.register("Counted-v0", entry_point=Counted, max_episode_steps=20)
    Counted.open, Counted.most, Counted.made = 0, 0, []


def train(out, *arguments, env="Counted-v0", steps=100):
    command = ["train", env, "--total-timesteps", str(steps), "--out", str(out), *TINY]
    return main([*command, "--eval-episodes", "3", *arguments])


def words(capsys):
    return " ".join(capsys.readouterr().out.split())


# -- help


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_fits_80_columns(capsys, monkeypatch, arguments):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    printed = capsys.readouterr().out
    assert caught.value.code == 0
    assert max(map(len, printed.splitlines())) <= 80
    assert "None" not in re.sub(r"\{None\}\||\(default: None\)|None to", "", printed)
    if arguments[0] in ("train", "check"):
        assert "--algo {" + ",".join(ALGORITHMS) + "}" in printed
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


# -- run folders


@pytest.mark.parametrize(
    ("env", "folder"),
    [
        ("a_module:Mine-v0", "a_module-Mine-v0"),
        ("ALE/Pong-v5", "ALE/Pong-v5"),
        ('x<>"|?*\\:y-v0', "x--------y-v0"),
        ("../Up-v0", "Up-v0"),
    ],
)
def test_a_run_folder_can_be_made_on_any_system(tmp_path, monkeypatch, env, folder):
    monkeypatch.chdir(tmp_path)

    class Anywhere(TRPO):
        def __init__(self, env, **options):
            super().__init__(Clock, **options)

    monkeypatch.setitem(ALGORITHMS, "trpo", Anywhere)
    monkeypatch.setattr(rl.run.cli, "evaluate", lambda *_, **__: "")
    assert main(["train", env, "--total-timesteps", "64", *TINY]) == 0
    (run,) = tmp_path.glob(f"runs/{folder}/trpo-seed0-*/checkpoint.zip")
    assert json.loads((run.parent / "config.json").read_text())["env_id"] == env


def test_checkpoints_are_written_while_it_trains(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(TRPO, "save", lambda self, _: saved.append(self.num_timesteps))
    assert train(tmp_path / "run", steps=640) == 0
    assert len(saved) == len(set(saved)) + 1 > 8  # the last one twice


def test_tensorboard_is_written_or_refused_at_once(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    assert train(tmp_path / "run", "--tensorboard") == 0
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    monkeypatch.setattr(rl.run.cli, "find_spec", lambda _: None)
    assert train(tmp_path / "other", "--tensorboard") == 1
    assert "pip install" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


# -- environments


@pytest.mark.parametrize("n_envs", [1, 2])
def test_no_more_copies_are_open_than_were_allowed(tmp_path, n_envs):
    out = tmp_path / "run"
    assert train(out, "--n-envs", str(n_envs)) == 0
    assert main(["eval", str(out), "--episodes", "5"]) == 0
    assert (Counted.most, Counted.open) == (n_envs, 0)


def test_arguments_of_the_environment_are_kept_with_the_run(tmp_path, capsys):
    out, given = tmp_path / "run", ["gravity=9.8", "wind=True", "name=it", "x=[1,2]", "y=null"]
    expected = {"gravity": 9.8, "wind": True, "name": "it", "x": [1, 2], "y": None}
    assert train(out, "--env-kwargs", *given) == 0
    assert main(["eval", str(out), "--episodes", "2"]) == 0
    assert main(["check", "Counted-v0", "--env-kwargs", *given]) in (0, 1)
    assert Counted.made
    assert all(arguments == expected for arguments in Counted.made)
    Counted.made.clear()
    assert main(["eval", str(out), "--episodes", "2", "--env-kwargs", "gravity=5"]) == 0
    assert Counted.made[-1] == {"gravity": 5}
    capsys.readouterr()
    for bad in ("gravity", "=3", "a b=3"):
        assert train(tmp_path / "other", "--env-kwargs", bad) == 1
        assert f"--env-kwargs takes KEY=VALUE, got {bad!r}" in capsys.readouterr().err
    assert train(tmp_path / "other", "--env-kwargs", "x=1", env="CartPole-v1") == 1
    assert "cannot make environment 'CartPole-v1'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("command", ["eval", "record"])
def test_an_agent_of_a_function_is_told_its_environment(tmp_path, capsys, command):
    path = tmp_path / "agent.zip"
    TRPO(Counted, n_envs=2, steps_per_update=64, hidden=(4,)).save(path)
    assert main([command, str(path)]) == 1
    err = capsys.readouterr().err
    assert err == f"error: {path} does not name its environment: pass --env ENV_ID\n"
    assert main(["eval", str(path), "--env", "Counted-v0", "--episodes", "2"]) == 0
    assert "TRPO on Counted-v0 after 0 steps" in words(capsys)
    assert main([command, str(path), "--env", "NoSuch-v0"]) == 1
    assert "'NoSuch-v0'" in capsys.readouterr().err


def test_evaluations_are_cut_off(tmp_path, capsys):
    gymnasium.register("Endless-v0", entry_point=lambda **_: Clock(length=-1))
    out = tmp_path / "run"
    assert train(out, "--max-episode-steps", "9", env="Endless-v0") == 0
    assert "over 2 episodes, 2 of them cut off after 9 steps" in words(capsys)
    assert main(["eval", str(out), "--max-episode-steps", "5"]) == 0
    assert "2 of them cut off after 5 steps" in words(capsys)
    assert train(tmp_path / "other", "--max-episode-steps", "0") == 1
    assert "--max-episode-steps must be at least 1" in capsys.readouterr().err


# -- what is printed


def test_returns_keep_their_digits(tmp_path, capsys):
    class Small(Clock):
        def step(self, action):
            observation, reward, *rest = super().step(action)
            return observation, 5e-3 * reward, *rest

    gymnasium.register("Small-v0", entry_point=lambda **_: Small())
    assert train(tmp_path / "run", env="Small-v0") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[1:2] == ["0.01500"] for line in lines)
    assert lines[-1].split()[:4] == ["evaluation", "mean", "return", "0.01500"]
    assert max(map(len, lines)) <= 80 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("algo", "kl", "expected"),
    [
        ("trpo", None, r"KL at most 0\.00\S+ of delta = 0.01 in 2 updates, 2 accepted"),
        ("npg", 0.0638, r"KL at most 0\.06380, beyond delta = 0.01 in 2 updates"),
        ("vpg", 0.0638, r"KL at most 0\.06380 in 2 updates"),
        ("kl_penalty --kl-target None", 0.0638, r"KL at most 0\.06380 in 2 updates, \d accepted"),
    ],
)
def test_a_kl_is_called_bounded_only_where_it_was(
    tmp_path, capsys, monkeypatch, algo, kl, expected
):
    kind = ALGORITHMS[algo.split()[0]]
    update = kind.update

    def pretend(self, path):
        log = update(self, path)
        return log if kl is None else log | {"train/kl_divergence_loss": kl}

    monkeypatch.setattr(kind, "update", pretend)
    assert train(tmp_path / "run", "--algo", *algo.split()) == 0
    assert re.search(expected + " evaluation", words(capsys))


def test_an_interrupt_before_the_training_is_one_line(capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(NPG, "__init__", interrupted)
    assert main(["train", "Counted-v0", "--algo", "npg"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
