"""What every algorithm shares, and what each does that the others do not."""

import math
from statistics import median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl import NPG, PPO, TRPO, VPG, KLPenalty, KLPenaltyConfig, NPGConfig, PPOConfig, evaluate
from rl.algorithms import load
from rl.experience.surrogate import clipped_surrogate, normalise, surrogate
from toys import Bandit, Clock, vector

ALGORITHMS = (TRPO, NPG, KLPenalty, PPO, VPG)
SMALL = {"n_envs": 4, "steps_per_update": 256, "hidden": (16,)}
BOLD = {
    TRPO: {"delta": 0.1},
    NPG: {"delta": 0.1},
    KLPenalty: {"kl_target": 0.1, "penalty": 1.0},
    PPO: {"lr": 1e-2, "batch_size": 64},
    VPG: {"policy_lr": 0.05},
}


def every_algorithm(test):
    return pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)(test)


def weights(agent):
    return [p.detach().clone() for m in agent.modules().values() for p in m.parameters()]


@every_algorithm
@pytest.mark.parametrize("shared", [False, True])
def test_it_learns_a_bandit(algorithm, shared):
    agent = algorithm(vector(Bandit, 4), shared_encoder=shared, **SMALL, **BOLD[algorithm])
    logs = []
    agent.learn(2500, progress=False, callback=lambda _, log: logs.append(log))
    assert evaluate(agent, vector(Bandit, 4), 8).mean == 1.0
    assert logs[-1]["rollout/ep_rew_mean"] > 0.9 > logs[0]["rollout/ep_rew_mean"]
    for key in ("train/kl_divergence_loss", "train/value_loss", "train/explained_variance"):
        assert all(key in log for log in logs)
    assert all(log["train/kl_divergence_loss"] >= 0 for log in logs)


@every_algorithm
def test_seeds_decide_everything(algorithm):
    agents = [
        algorithm("CartPole-v1", seed=s, **SMALL).learn(600, progress=False) for s in (3, 3, 4)
    ]
    a, b, c = map(weights, agents)
    assert all(map(torch.equal, a, b))
    assert not all(map(torch.equal, a, c))


@every_algorithm
def test_a_loaded_agent_continues_as_the_saved_one(algorithm, tmp_path):
    agent = algorithm(vector(lambda: Clock(length=3), 4), **SMALL).learn(300, progress=False)
    agent.save(tmp_path / "agent.zip")
    loaded = algorithm.load(tmp_path / "agent.zip", vector(lambda: Clock(length=3), 4))
    rollout = agent._collector.collect(agent.policy, 64)
    loaded.generator.set_state(agent.generator.get_state())
    agent.update(rollout)
    loaded.update(rollout)
    assert all(map(torch.equal, weights(agent), weights(loaded)))


@every_algorithm
def test_masked_rows_reach_no_update(algorithm):
    agents = [algorithm(vector(lambda: Clock(length=3), 4), **SMALL) for _ in range(2)]
    for agent, garbage in zip(agents, (0.0, 1e6), strict=True):
        agent.learn(1, progress=False)
        rollout = agent._collector.collect(agent.policy, 64)
        rollout.rewards[~rollout.valid] = garbage
        rollout.actions[~rollout.valid] = int(garbage > 0)
        agent.update(rollout)
    assert all(map(torch.equal, *map(weights, agents)))


# -- natural policy gradient


def test_a_natural_step_has_the_kl_that_was_asked_for():
    """To second order: the measured KL is within a few per cent of delta at a small delta."""
    logs = []
    agent = NPG("CartPole-v1", delta=1e-4, **SMALL)
    agent.learn(1000, progress=False, callback=lambda _, log: logs.append(log))
    for log in logs:
        assert log["train/kl_divergence_loss"] == pytest.approx(1e-4, rel=0.05)
        assert log["trust/actual_reduction"] == pytest.approx(
            log["trust/predicted_reduction"], rel=0.2
        )


def test_a_fixed_step_is_proportional_to_its_size():
    steps = []
    for size in (1e-3, 2e-3):
        agent = NPG("CartPole-v1", step_size=size, **SMALL)
        before = torch.cat([p.detach().flatten().clone() for p in agent.policy.parameters()])
        agent.learn(1, progress=False)
        after = torch.cat([p.detach().flatten() for p in agent.policy.parameters()])
        steps.append(after - before)
    # differences of float32 parameters
    torch.testing.assert_close(2 * steps[0], steps[1], rtol=1e-2, atol=1e-6)


def test_it_is_trpo_without_the_search():
    """Both go along the same direction."""
    agents = [a("CartPole-v1", delta=1e-3, **SMALL) for a in (NPG, TRPO)]
    moves = []
    for agent in agents:
        before = torch.cat([p.detach().flatten().clone() for p in agent.policy.parameters()])
        agent.learn(1, progress=False)
        after = torch.cat([p.detach().flatten() for p in agent.policy.parameters()])
        moves.append(after - before)
    assert torch.cosine_similarity(*moves, dim=0) > 0.999


# -- the penalty


def test_the_penalty_drives_the_kl_to_its_target():
    logs = []
    agent = KLPenalty("CartPole-v1", kl_target=0.005, penalty=100.0, **SMALL)
    agent.learn(8000, progress=False, callback=lambda _, log: logs.append(log))
    late = [log["train/kl_divergence_loss"] for log in logs[-16:]]
    assert 0.005 / 2.5 < median(late) < 0.005 * 2.5
    assert logs[0]["train/kl_divergence_loss"] < 0.001  # what the first price allows
    assert logs[0]["trust/penalty_bound"] > 1e4


def test_a_fixed_penalty_stays():
    logs = []
    agent = KLPenalty("CartPole-v1", kl_target=None, penalty=7.0, **SMALL)
    agent.learn(1000, progress=False, callback=lambda _, log: logs.append(log))
    assert {log["trust/penalty"] for log in logs} == {7.0}
    # the objective pays for the KL
    assert all(log["trust/actual_reduction"] >= 7 * log["train/kl_divergence_loss"] for log in logs)


# -- PPO


@given(
    ratios=st.lists(st.floats(0.1, 3), min_size=1, max_size=5),
    advantage=st.floats(-2, 2),
    clip=st.floats(0.05, 0.5),
)
def test_the_clipped_objective_is_a_bound(ratios, advantage, clip):
    log_prob = torch.tensor(ratios, dtype=torch.float64).log()
    old, a = torch.zeros_like(log_prob), torch.full_like(log_prob, advantage)
    clipped, share = clipped_surrogate(log_prob, old, a, clip)
    assert clipped <= surrogate(log_prob, old, a) + 1e-12
    by_hand = [
        min(r * advantage, min(max(r, 1 - clip), 1 + clip) * advantage)
        for r in log_prob.exp().tolist()
    ]
    assert clipped.item() == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-12)
    outside = [abs(r - 1) > clip for r in log_prob.exp().tolist()]
    assert share.item() == pytest.approx(sum(outside) / len(outside))


def test_one_optimizer_has_every_parameter_once():
    for shared in (False, True):
        agent = PPO("CartPole-v1", shared_encoder=shared, **SMALL)
        held = [id(p) for group in agent.optimizer.param_groups for p in group["params"]]
        both = {id(p) for m in (agent.policy, agent.critic) for p in m.parameters()}
        assert len(held) == len(set(held))
        assert set(held) == both


def test_coefficients_move_over_learn():
    logs, seen = [], []
    agent = PPO(
        "CartPole-v1", lr=1e-3, final_lr=0.0, entropy_coef=0.1, final_entropy_coef=0.0, **SMALL
    )
    scheduled = agent.scheduled
    agent.scheduled = lambda *pair: seen.append(scheduled(*pair)) or seen[-1]
    agent.learn(1000, progress=False, callback=lambda _, log: logs.append(log))
    rates = [log["train/learning_rate"] for log in logs]
    assert rates[0] == 1e-3
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 5e-4
    assert seen[0] == 0.1 > seen[-2]


def test_the_entropy_bonus_keeps_entropy():
    entropies = []
    for coefficient in (0.0, 3.0):
        logs = []
        agent = PPO(vector(Bandit, 4), entropy_coef=coefficient, **SMALL, **BOLD[PPO])
        agent.learn(2000, progress=False, callback=lambda _, log, logs=logs: logs.append(log))
        entropies.append(-logs[-1]["train/entropy_loss"])
    assert entropies[1] > 0.5 > 0.3 > entropies[0]


def test_passes_end_at_the_kl_limit():
    agent = PPO("CartPole-v1", lr=0.05, kl_limit=1e-3, **SMALL)
    logs = []
    agent.learn(500, progress=False, callback=lambda _, log: logs.append(log))
    assert all(log["train/n_updates"] < 10 for log in logs)


# -- bad input


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (PPOConfig, {"clip": 0}, "clip must be a positive"),
        (PPOConfig, {"epochs": 0}, "epochs must be at least 1"),
        (NPGConfig, {"step_size": -1.0}, "step_size must be a positive"),
        (NPGConfig, {"delta": 0.0}, "delta must be a positive"),
        (KLPenaltyConfig, {"penalty": math.inf}, "penalty must be a positive"),
        (PPOConfig, {"advantages": "gea"}, "advantages must be one of"),
        (PPOConfig, {"critic_fit": "sgd"}, "critic_fit must be one of"),
    ],
)
def test_options_out_of_range_are_refused(config, options, words):
    with pytest.raises(ValueError, match=words):
        config(**options)


def test_normalised_advantages_of_a_single_sample_are_zero():
    assert normalise(torch.tensor([3.0])).tolist() == [0.0]


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_a_clear_error(device):
    with pytest.raises(ValueError, match=f"cannot compute on device='{device}'.*such as 'cpu'"):
        TRPO("CartPole-v1", device=device)


@every_algorithm
def test_the_device_is_kept_or_replaced(algorithm, tmp_path):
    options = {"steps_per_update": 64, "hidden": (8,), "normalise_observations": True}
    agent = algorithm("CartPole-v1", device="cpu:0", **options).learn(128, progress=False)
    agent.save(tmp_path / "agent.zip")
    for device in (None, "cpu"):
        again = load(tmp_path / "agent.zip", device=device)
        assert again.config.device == (device or "cpu:0")
        again.learn(64, progress=False)
