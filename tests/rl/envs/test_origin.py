"""Rows are float32; what float32 would round is measured from an origin."""

import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Tuple

from rl import TRPO, ObservationLayout
from toys import Clock

FAR = 1.7e9  # seconds since 1970


def anywhere(dtype, n=2):
    bound = np.iinfo(dtype).max if np.dtype(dtype).kind in "iu" else np.inf
    return Box(-bound if np.dtype(dtype).kind != "u" else 0, bound, (n,), dtype)


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.int32, np.uint32, np.uint64])
def test_small_differences_of_large_numbers_survive(dtype):
    steps = np.array([[0, 3], [1, 7], [60, 0]])
    batch = (FAR + steps).astype(dtype)
    layout = ObservationLayout(anywhere(dtype)).with_origin(batch)
    assert np.array_equal(layout.origin, batch[0])
    assert layout.origin.dtype == np.float64
    rows = layout.flat(batch)
    assert rows.dtype == np.float32
    assert np.array_equal(rows, steps - steps[0])
    plain = ObservationLayout(anywhere(dtype))
    assert plain.origin is None
    assert np.array_equal(plain.flat(batch), batch.astype(np.float32))  # as ever, bit for bit


@pytest.mark.parametrize(
    "space",
    [
        anywhere(np.float32),
        anywhere(np.int16),
        Box(0, 255, (9, 9), np.uint8),
        Discrete(4, start=10**6),
        MultiBinary(3),
    ],
)
def test_what_float32_holds_needs_none(space):
    layout = ObservationLayout(space)
    assert layout.with_origin(np.stack([space.sample()])) is layout


def test_only_numbers_that_are_wide_are_shifted():
    mask = Box(0, 1, (3,), np.int64)
    space = Dict(
        action_mask=mask, pair=Tuple((Discrete(2), anywhere(np.float64))), x=anywhere(np.float32, 1)
    )
    batch = {
        "action_mask": np.array([[1, 0, 1], [0, 1, 1]]),
        "pair": (np.array([1, 0]), np.array([[FAR, np.inf], [FAR + 1, 5]])),
        "x": np.float32([[7], [8]]),
    }
    layout = ObservationLayout(space).with_origin(batch)
    assert layout.origin.tolist() == [0, 0, 0, 0, 0, FAR, 0, 0]
    assert layout.flat(batch)[1].tolist() == [0, 1, 1, 1, 0, 1, 5, 8]


def test_an_origin_can_be_given_back():
    layout = ObservationLayout(anywhere(np.float64), mask=2).with_origin(np.full((3, 2), FAR))
    assert layout.origin.tolist() == [FAR, FAR, 0, 0]
    again = ObservationLayout(layout.space, mask=2, origin=layout.origin.tolist())
    infos, batch = {"action_mask": np.ones((1, 2))}, np.array([[FAR + 1, FAR - 2]])
    assert again.flat(batch, infos).tolist() == [[1, -2, 1, 1]]
    with pytest.raises(ValueError, match=r"origin must have shape \(4,\), got \(2,\)"):
        ObservationLayout(layout.space, mask=2, origin=np.zeros(2))


def test_an_agent_has_an_origin_where_it_normalises():
    class Dated(Clock):
        def __init__(self):
            super().__init__()
            self.observation_space = anywhere(np.float64)

        def _observation(self):
            return FAR + super()._observation().astype(np.float64)

    small = {"n_envs": 2, "steps_per_update": 64, "hidden": (4,)}
    plain, shifted = (TRPO(Dated, normalise_observations=n, **small) for n in (False, True))
    assert plain.layout.origin is None
    assert shifted.layout.origin.tolist() == [FAR, FAR]  # the first copy's: the numbers are zero
    shifted.learn(64, progress=False)
    moments = shifted.observation_norm.moments
    assert moments.mean[1] == 1  # of the times 0, 1, 2
