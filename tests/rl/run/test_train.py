"""``python -m rl train``: its run folders, its environments and its summary."""

import json
import re

import gymnasium
import pytest
from gymnasium.envs.classic_control import CartPoleEnv

import rl.run.cli
from rl import NPG, TRPO
from rl.algorithms import ALGORITHMS
from rl.run.callbacks import KeepCheckpoint
from rl.run.cli import main
from toys import Clock

TINY = ["--n-envs", "2", "--steps-per-update", "64", "--hidden", "4", "--no-progress"]


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


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Do not draw learning curves, which takes longer than all the rest."""
    monkeypatch.setattr(rl.run.cli, "plot_learning_curve", lambda *_, **__: None)


def train(out, *arguments, env="Counted-v0", steps=100):
    command = ["train", env, "--total-timesteps", str(steps), "--out", str(out), *TINY]
    return main([*command, "--eval-episodes", "3", *arguments])


def words(capsys):
    return " ".join(capsys.readouterr().out.split())


# -- algorithms and run folders


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_algorithm_trains_and_is_found_again(tmp_path, capsys, algo):
    out, name = tmp_path / "run", ALGORITHMS[algo].__name__
    assert train(out, "--algo", algo) == 0
    assert f"{name} on 2 x Counted-v0, stepped in turn in this process" in words(capsys)
    assert main(["eval", str(out), "--episodes", "2"]) == 0
    assert f"{name} on Counted-v0 after" in words(capsys)
    assert json.loads((out / "config.json").read_text())["algorithm"] == algo


def test_an_error_in_training_keeps_what_was_learnt(tmp_path, capsys, monkeypatch):
    update = TRPO.update

    def failing(self, path):
        if self.iterations == 2:
            raise ValueError("the simulator broke")
        return update(self, path)

    monkeypatch.setattr(TRPO, "update", failing)
    assert train(tmp_path / "run", steps=400) == 1
    assert capsys.readouterr().err == "error: the simulator broke\n"
    assert TRPO.load(tmp_path / "run" / "checkpoint.zip").iterations == 2


@pytest.mark.parametrize(
    ("env", "folder"),
    [
        ("a_module:Mine-v0", "a_module-Mine-v0"),
        ("ALE/Pong-v5", "ALE/Pong-v5"),
        ('x<>"|?*\\:y-v0', "x--------y-v0"),
        ("../Up-v0", "Up-v0"),
    ],
)
def test_a_run_folder_can_be_made_on_any_system(tmp_path, monkeypatch, capsys, env, folder):
    monkeypatch.chdir(tmp_path)

    class Anywhere(TRPO):
        def __init__(self, env, **options):
            super().__init__(Clock, **options)

    monkeypatch.setitem(ALGORITHMS, "trpo", Anywhere)
    monkeypatch.setattr(rl.run.cli, "evaluate", lambda *_, **__: "")
    assert main(["train", env, "--total-timesteps", "64", *TINY]) == 0
    (run,) = tmp_path.glob(f"runs/{folder}/trpo-seed0-*/checkpoint.zip")
    assert json.loads((run.parent / "config.json").read_text())["env_id"] == env
    assert str(run.parent.relative_to(tmp_path)) in capsys.readouterr().out


def test_checkpoints_are_written_while_it_trains(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(KeepCheckpoint, "save", lambda _, agent: saved.append(agent.num_timesteps))
    assert train(tmp_path / "run", "--save-every", "1e-9", steps=640) == 0
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
