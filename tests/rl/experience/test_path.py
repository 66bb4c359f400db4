import dataclasses

import pytest
import torch

from agents import path_of
from rl import Path


def bools(*columns):
    """Return a ``(T, N)`` tensor from one string of 0 and 1 for each environment."""
    return torch.tensor([[c == "1" for c in column] for column in columns]).T


def numbered(mask):
    """Return a path of four steps of two environments whose entries count up."""
    T, N = mask.shape
    return path_of(
        observations=torch.arange((T + 1) * N * 3.0).reshape(T + 1, N, 3),
        actions=torch.arange(T * N * 2.0).reshape(T, N, 2),
        log_prob=torch.arange(T * N * 1.0).reshape(T, N),
        signals={"reward": torch.arange(T * N * 1.0).reshape(T, N), "cost": torch.ones(T, N)},
        terminated=bools("0010", "0000"),
        truncated=bools("0000", "1000"),
        mask=mask,
        version=3,
    )


WHOLE, HOLES = bools("1111", "1111"), bools("1110", "1011")


def test_flat_keeps_what_counts_in_the_order_of_time():
    path = numbered(HOLES)
    assert path.steps == 6
    assert path.flat(path.log_prob).tolist() == [0, 1, 2, 4, 5, 7]
    assert path.flat(path.actions).shape == (6, 2)
    assert path.flat(path.actions)[:, 0].tolist() == [0, 2, 4, 8, 10, 14]
    assert path.rows[:, 0].tolist() == [0, 3, 6, 12, 15, 21]  # never the last observations
    assert torch.equal(path.rows, path.observations[:-1][HOLES])
    whole = numbered(WHOLE)
    assert whole.steps == 8
    assert whole.flat(whole.log_prob).tolist() == list(range(8))


def test_an_episode_is_done_where_it_terminated_or_was_cut_off():
    assert torch.equal(numbered(WHOLE).done, bools("0010", "1000"))


def test_the_reward_is_a_signal_and_can_be_exchanged():
    path = numbered(HOLES)
    assert path.rewards is path.signals["reward"]
    other = path.with_reward(-path.rewards)
    assert other.rewards.tolist() == (-path.rewards).tolist()
    assert torch.equal(other.signals["cost"], path.signals["cost"])
    assert path.rewards.max() == 7  # the path itself stays
    assert other.observations is path.observations
    assert other.version == 3


def test_values_follow_in_time_except_at_finals():
    """A state's value is its first entry; finals are put at their places."""
    path = numbered(WHOLE)
    now, following = path.values(lambda rows: rows[..., 0])
    assert now[:, 1].tolist() == [3, 9, 15, 21]
    assert following[:, 1].tolist() == [9, 15, 21, 27]
    finals = torch.tensor([[-1.0, 0, 0], [-2.0, 0, 0]])
    path = dataclasses.replace(path, finals=finals, final_at=torch.tensor([[0, 1], [2, 0]]))
    now, following = path.values(lambda rows: rows[..., 0])
    assert now[:, 1].tolist() == [3, 9, 15, 21]  # the next episode's first state among them
    assert following[:, 0].tolist() == [6, 12, -2, 24]
    assert following[:, 1].tolist() == [-1, 15, 21, 27]


@pytest.mark.parametrize("shape", [(5, 2, 1), (5,), ()])
def test_a_critic_of_another_shape_is_named(shape):
    words = r"one value per row, shape \(5, 2\) for rows \(5, 2, 3\), got"
    with pytest.raises(ValueError, match=words):
        numbered(WHOLE).values(lambda _: torch.zeros(shape))


def test_a_path_moves_to_a_device_as_a_whole():
    path = numbered(HOLES)
    assert path.steps
    assert len(path.rows) == 6  # what was computed of it does not move along
    moved = path.to("meta")
    for field in dataclasses.fields(Path):
        x = getattr(moved, field.name)
        for tensor in x.values() if field.name == "signals" else [x]:
            if field.name == "version":
                assert tensor == 3
            else:
                assert tensor.device.type == "meta"
                assert tensor.dtype == _of(path, field.name, tensor).dtype
    back = path.to("cpu")
    assert torch.equal(back.rows, path.rows)
    assert back.signals.keys() == {"reward", "cost"}


def _of(path, name, tensor):
    return path.signals["reward"] if name == "signals" else getattr(path, name)
