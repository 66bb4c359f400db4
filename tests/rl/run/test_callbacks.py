"""What callbacks do, and what they refuse before anything is learnt."""

import pytest
import torch

from rl import (
    TRPO,
    CSVLog,
    EvaluateBest,
    Every,
    SaveCheckpoint,
    StopOnReward,
    checkpoint,
    evaluate,
    load,
)
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


def test_several_can_be_called_every_so_often():
    calls = []
    both = Every(96, [lambda *_: calls.append(1), None, lambda agent, _: agent.iterations < 4])
    agent = agent_of().learn(1000, False, both)
    assert (len(calls), agent.iterations) == (2, 4)


@pytest.mark.parametrize("steps", [0, 0.5, "100", None, float("nan")])
def test_steps_are_a_number(steps):
    with pytest.raises(ValueError, match="steps must be at least 1, got"):
        Every(steps, print)


def test_callbacks_that_cannot_be_called_are_refused():
    with pytest.raises(TypeError, match=r"got 'log\.csv'"):
        Every(10, ["log.csv"])


@pytest.mark.parametrize("threshold", ["475", None, float("nan")])
def test_thresholds_are_numbers(threshold):
    with pytest.raises(ValueError, match="threshold must be a number, got"):
        StopOnReward(threshold)


def test_folders_are_made_at_once_or_refused(tmp_path):
    SaveCheckpoint(str(tmp_path / "a" / "b"))
    EvaluateBest(Bandit, str(tmp_path / "c" / "best.zip"))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "c"]
    (tmp_path / "file").touch()
    for make in (
        lambda: SaveCheckpoint(tmp_path / "file"),
        lambda: CSVLog(tmp_path / "file" / "log.csv"),
        lambda: EvaluateBest(Bandit, tmp_path / "file" / "best.zip"),
    ):
        with pytest.raises(OSError, match="file"):
            make()
    with pytest.raises(ValueError, match="is a folder"):
        EvaluateBest(Bandit, tmp_path / "a")


def test_an_environment_that_is_not_there_is_named_at_once():
    with pytest.raises(ValueError, match="cannot make environment 'NoSuch-v1'"):
        EvaluateBest("NoSuch-v1")
    with pytest.raises(TypeError, match=r"env must be an id .* or a gymnasium VectorEnv, got int"):
        EvaluateBest(3)


# -- the best agent of a training that is resumed


def test_a_best_agent_is_replaced_by_a_better_one_alone(tmp_path):
    best = tmp_path / "best.zip"
    agent = TRPO(lambda: Clock(length=3), **SMALL)
    EvaluateBest(lambda: Clock(length=5), best, episodes=2)(agent, {})
    assert checkpoint.read(best)["notes"] == {"eval/mean_reward": 5.0}
    first = best.read_bytes()
    for length, mean, kept in ((4, 5.0, True), (5, 5.0, True), (6, 6.0, False)):
        again = EvaluateBest(lambda n=length: Clock(length=n), best, episodes=2)
        assert again.best_mean == 5.0
        again(agent, {})
        assert again.best_mean == mean
        assert (best.read_bytes() == first) is kept
    assert load(best, Clock).num_timesteps == 0


def test_a_file_that_does_not_say_what_it_reached_is_kept(tmp_path):
    best = tmp_path / "best.zip"
    TRPO(Bandit, **SMALL).save(best)
    before = best.read_bytes()
    with pytest.raises(ValueError, match="does not say what its agent reached"):
        EvaluateBest(Bandit, best)
    best.write_bytes(before[:100])
    with pytest.raises(checkpoint.CheckpointError, match="truncated"):
        EvaluateBest(Bandit, best)
