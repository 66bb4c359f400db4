import pytest
import torch

from agents import MEDIUM, SMALL, logs_of
from rl import TRPO, evaluate
from toys import Clock, vector


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_every_update_stays_within_delta_and_improves(env):
    agent = TRPO(env, delta=0.02, **MEDIUM)
    logs = logs_of(agent, 1500)
    for log in logs:
        assert log["trust/status"] == "accepted"
        assert 0 < log["train/kl_divergence_loss"] <= 0.02
        assert log["trust/actual_reduction"] > 0
    assert logs[-1]["time/iterations"] == len(logs) == agent.iterations
    assert agent.num_timesteps == logs[-1]["time/total_timesteps"] >= 1500


def test_delta_moves_over_learn():
    """Linearly in the steps made before the update; the next call of learn starts over."""
    agent = TRPO(vector(lambda: Clock(length=99), 4), delta=0.04, final_delta=0.01, **SMALL)
    deltas = [log["trust/delta"] for log in logs_of(agent, 4 * 64)]
    assert deltas == pytest.approx([0.04, 0.0325, 0.025, 0.0175], rel=1e-12)
    assert logs_of(agent, 64)[0]["trust/delta"] == 0.04


def test_the_curvature_may_be_that_of_some_states():
    agent = TRPO("CartPole-v1", curvature_fraction=0.25, **MEDIUM).learn(1, progress=False)
    path = agent.training.collector.collect(agent.policy, 64)
    some = agent.curvature(path)()
    assert some.batch_shape == (path.steps // 4,)
    agent.iterations += 1
    assert not torch.equal(agent.curvature(path)().logits, some.logits)  # another draw
    assert TRPO("CartPole-v1", curvature_fraction=1, **MEDIUM).curvature(path) is None


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(10))
def test_cartpole_is_solved_within_thirty_thousand_steps(seed):
    agent = TRPO("CartPole-v1", seed=seed).learn(27_000, progress=False)
    assert agent.num_timesteps <= 30_000
    assert evaluate(agent, "CartPole-v1", 20).mean >= 475
