import builtins
import csv

import pytest
import torch

from rl import (
    TRPO,
    CSVLog,
    EvaluateBest,
    Every,
    SaveCheckpoint,
    StopOnReward,
    TensorBoardLog,
    evaluate,
    load,
)
from rl.run.logs import read_csv
from toys import Bandit, Clock, vector

SMALL = {"n_envs": 4, "steps_per_update": 64, "hidden": (8,)}


def agent_of(make=lambda: Clock(length=3, truncate=True), **options):
    return TRPO(vector(make, 4), **SMALL | options)


@pytest.mark.parametrize(
    ("every", "calls"), [(1, [48, 96, 144]), (48, [48, 96, 144]), (60, [96, 144]), (100, [144])]
)
def test_every_so_many_steps(every, calls):
    """An update has 48 steps that count."""
    seen = []
    agent = agent_of()
    agent.learn(144, False, Every(every, lambda agent, _: seen.append(agent.num_timesteps)))
    assert seen == calls


def test_a_second_call_of_learn_counts_from_its_start():
    seen = []
    agent = agent_of().learn(144, False)
    agent.learn(144, False, Every(96, lambda agent, _: seen.append(agent.num_timesteps)))
    assert seen == [240]


def test_all_are_called_and_any_can_stop():
    calls = []
    agent = agent_of()
    agent.learn(
        1000,
        False,
        [lambda *_: False, lambda *_: calls.append("second"), lambda *_: calls.append("third")],
    )
    assert calls == ["second", "third"]
    assert agent.iterations == 1


def test_checkpoints_are_named_by_their_step(tmp_path):
    agent = agent_of().learn(144, False, Every(96, SaveCheckpoint(tmp_path / "kept")))
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["96.zip"]
    other = load(tmp_path / "kept" / "96.zip", vector(Clock, 4))
    assert other.num_timesteps == 96 < agent.num_timesteps


def test_the_best_agent_is_kept(tmp_path):
    best = EvaluateBest(Bandit, tmp_path / "best.zip", episodes=4)
    means = []
    agent = agent_of(Bandit, delta=0.2)
    agent.learn(800, False, [best, lambda _, log: means.append(log["eval/mean_reward"])])
    assert best.best_mean == max(means) == 1.0
    assert evaluate(load(tmp_path / "best.zip", Bandit), Bandit, 4).mean == 1.0
    # a worse one does not take its place
    kept = (tmp_path / "best.zip").read_bytes()
    with torch.no_grad():
        agent.policy.linear[0].bias.copy_(torch.tensor([5.0, 0.0]))  # the action that pays nothing
    log = {}
    best(agent, log)
    assert log["eval/mean_reward"] == 0 < best.best_mean
    assert (tmp_path / "best.zip").read_bytes() == kept


def test_training_ends_at_the_return():
    agent = agent_of(Bandit, delta=0.2)
    logs = []
    agent.learn(100_000, False, [StopOnReward(0.8), lambda _, log: logs.append(log)])
    assert logs[-1]["rollout/ep_rew_mean"] >= 0.8 > logs[-2]["rollout/ep_rew_mean"]
    early = agent_of(Bandit)
    early.learn(
        10_000, False, [EvaluateBest(Bandit, episodes=4), StopOnReward(-1.0, "eval/mean_reward")]
    )
    assert early.iterations == 1


def test_a_csv_file_takes_new_columns(tmp_path):
    path = tmp_path / "log.csv"
    log = CSVLog(path)
    log(None, {"a": 1, "b": "x"})
    log(None, {"a": 2, "b": "y", "c": 0.5})
    CSVLog(path)(None, {"a": 3, "b": "z"})
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["a", "b", "c"],
            ["1", "x", ""],
            ["2", "y", "0.5"],
            ["3", "z", ""],
        ]
    columns = read_csv(path)
    assert columns["a"] == [1, 2, 3]
    assert str(columns["c"]) == "[nan, 0.5, nan]"
    assert "b" not in columns


def test_tensorboard_is_asked_for_in_words(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *arguments):
        if name.startswith("torch.utils.tensorboard"):
            raise ModuleNotFoundError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"torch-trustregion\[tensorboard\]"):
        TensorBoardLog(tmp_path)


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    agent_of().learn(144, False, TensorBoardLog(tmp_path))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    kls = events.Scalars("train/kl_divergence_loss")
    assert [event.step for event in kls] == [48, 96, 144]
    assert "trust/status" not in events.Tags()["scalars"]


def test_steps_must_be_positive():
    with pytest.raises(ValueError, match="steps must be at least 1"):
        Every(0, StopOnReward(1))
