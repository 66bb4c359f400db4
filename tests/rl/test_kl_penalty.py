from statistics import median

from agents import MEDIUM, logs_of
from rl import KLPenalty


def test_the_penalty_drives_the_kl_to_its_target():
    logs = logs_of(KLPenalty("CartPole-v1", kl_target=0.005, penalty=100.0, **MEDIUM), 8000)
    late = [log["train/kl_divergence_loss"] for log in logs[-16:]]
    assert 0.005 / 2.5 < median(late) < 0.005 * 2.5
    assert logs[0]["train/kl_divergence_loss"] < 0.001  # what the first price allows
    assert logs[0]["trust/penalty_bound"] > 1e4


def test_a_fixed_penalty_stays():
    logs = logs_of(KLPenalty("CartPole-v1", kl_target=None, penalty=7.0, **MEDIUM), 1000)
    assert {log["trust/penalty"] for log in logs} == {7.0}
    # the objective pays for the KL
    assert all(log["trust/actual_reduction"] >= 7 * log["train/kl_divergence_loss"] for log in logs)


def test_an_adapted_penalty_continues_where_the_saved_one_was(tmp_path):
    agent = KLPenalty("CartPole-v1", penalty=0.01, **MEDIUM).learn(500, progress=False)
    (group,) = agent.policy_optimizer.param_groups
    assert group["penalty"] > 0.01  # the first steps are far too long
    agent.save(tmp_path / "agent.zip")
    for options, expected in (({}, group["penalty"]), ({"penalty": 3.0}, 3.0)):
        loaded = KLPenalty.load(tmp_path / "agent.zip", **options)
        assert loaded.policy_optimizer.param_groups[0]["penalty"] == expected
