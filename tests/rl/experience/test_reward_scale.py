import torch
from hypothesis import given
from hypothesis import strategies as st

from agents import path_of
from rl.experience.reward_scale import RewardScale


def paid(rewards, done=None, mask=None):
    """Return a path of these rewards; ends are truncations and terminations in turn."""
    no = torch.zeros(rewards.shape, dtype=torch.bool)
    done = no if done is None else done
    odd = (torch.arange(len(rewards)) % 2 == 1)[:, None]
    ends = {"terminated": done & odd, "truncated": done & ~odd}
    return path_of(signals={"reward": rewards, "cost": rewards}, mask=mask, **ends)


@given(st.integers(0, 2**31), st.integers(1, 9), st.floats(0, 1), st.integers(1, 8))
def test_rewards_are_divided_by_the_spread_of_their_discounted_sums(seed, T, gamma, cut):
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randn(T, 3, generator=g)
    done = torch.rand(T, 3, generator=g) < 0.3
    mask = ~torch.cat([torch.zeros(1, 3, dtype=torch.bool), done[:-1]])
    done = done & mask
    scale = RewardScale(3, gamma)
    cut = min(cut, T)
    for rows in (slice(0, cut), slice(cut, T)):  # the sums go on from one path to the next
        if rows.stop > rows.start:
            scale.update(paid(rewards[rows], done[rows], mask[rows]))
    sums, running = [], [0.0] * 3
    for t in range(T):
        for i in range(3):
            if mask[t, i]:
                running[i] = rewards[t, i].item() + gamma * running[i]
                sums.append(running[i])
            if done[t, i]:
                running[i] = 0.0
    spread = torch.tensor(sums, dtype=torch.float64).std(correction=0).item()
    scaled = scale(paid(rewards, done, mask))
    expected = rewards / spread if spread > 0 else rewards
    torch.testing.assert_close(scaled.rewards, expected, rtol=1e-5, atol=0)
    assert torch.equal(scaled.signals["cost"], rewards)  # other signals stay


def test_rewards_stay_as_they_are_where_their_sums_do_not_vary():
    scale, path = RewardScale(1, 0.0), paid(torch.ones(4, 1))
    assert torch.equal(scale(path).rewards, path.rewards)
    scale.update(path)
    assert torch.equal(scale(path).rewards, path.rewards)


def test_a_loaded_scale_starts_new_episodes_in_the_same_units():
    scale, other = RewardScale(2, 0.9), RewardScale(3, 0.9)  # of another number of environments
    path = paid(torch.randn(6, 2))
    scale.update(path)
    other.load_state_dict(scale.state_dict())
    assert torch.equal(scale(path).rewards, other(path).rewards)
    assert not other.running.any()
