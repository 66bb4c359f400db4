import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from hypothesis import given
from hypothesis import strategies as st

from rl.envs.layout import ObservationLayout

leaves = st.one_of(
    st.builds(
        lambda shape: spaces.Box(-5, 5, shape, np.float32),
        st.lists(st.integers(1, 3), max_size=2).map(tuple),
    ),
    st.builds(spaces.Discrete, st.integers(1, 5), start=st.integers(-3, 3)),
    st.builds(spaces.MultiBinary, st.integers(1, 4)),
    st.builds(spaces.MultiDiscrete, st.lists(st.integers(1, 4), min_size=1, max_size=3)),
    st.just(spaces.Box(0, 255, (8, 9, 3), np.uint8)),
)
composed = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from("abcd"), inner, min_size=1, max_size=3).map(spaces.Dict),
        st.lists(inner, min_size=1, max_size=3).map(spaces.Tuple),
    ),
    max_leaves=5,
)


@given(space=composed, n=st.integers(1, 4), seed=st.integers(0, 100))
def test_a_row_is_what_gymnasium_flattens_to(space, n, seed):
    """Its own ``flatten``, one observation at a time, is the oracle."""
    batched = batch_space(space, n)
    batched.seed(seed)
    batch = batched.sample()
    layout = ObservationLayout(space)
    rows = layout.flat(batch)
    expected = [
        gymnasium.spaces.flatten(space, one)
        for one in gymnasium.vector.utils.iterate(batched, batch)
    ]
    np.testing.assert_array_equal(rows, np.stack(expected).astype(rows.dtype))
    assert rows.shape == (n, layout.width)


@given(space=composed)
def test_the_parts_cover_a_row(space):
    layout = ObservationLayout(space)
    columns = [c for part in layout.parts for c in range(part.start, part.columns.stop)]
    assert columns == list(range(layout.width))


def test_kinds_and_names_of_the_parts():
    space = spaces.Dict(
        camera=spaces.Box(0, 255, (84, 84, 3), np.uint8),
        stack=spaces.Box(0, 255, (4, 84, 84), np.uint8),
        grey=spaces.Box(0, 255, (10, 10), np.uint8),
        arm=spaces.Dict(position=spaces.Box(-1, 1, (2,)), ram=spaces.Box(0, 255, (128,), np.uint8)),
        action_mask=spaces.MultiBinary(5),
    )
    layout = ObservationLayout(space)
    kinds = {part.name: part.kind for part in layout.parts}
    assert kinds == {
        "camera": "image",
        "stack": "image",
        "grey": "image",
        "arm.position": "vector",
        "arm.ram": "vector",
        "action_mask": "mask",
    }
    assert layout.dtype == np.float32


def test_rows_of_images_alone_are_bytes():
    layout = ObservationLayout(spaces.Box(0, 255, (16, 16, 3), np.uint8))
    batch = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    rows = layout.flat(batch)
    assert rows.dtype == np.uint8
    np.testing.assert_array_equal(rows.reshape(batch.shape), batch)


def test_masks_of_infos_are_the_last_columns():
    layout = ObservationLayout(spaces.Discrete(2), mask=3)
    stacked = np.empty(2, dtype=object)  # as gymnasium stacks arrays of single environments
    stacked[:] = [np.array([1, 0, 1], np.int8), np.array([0, 1, 1], np.int8)]
    rows = layout.flat(np.array([0, 1]), {"action_mask": stacked})
    assert rows.tolist() == [[1, 0, 1, 0, 1], [0, 1, 0, 1, 1]]
    with pytest.raises(ValueError, match="no infos\\['action_mask'\\]"):
        layout.flat(np.array([0, 1]), {})


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (spaces.Text(5), "unsupported observation space Text"),
        (spaces.Dict(a=spaces.Sequence(spaces.Discrete(2))), "at 'a'"),
        (spaces.Box(-1, 1, (0,)), "it has no entries"),
        (spaces.Dict(), "it has no entries"),
    ],
)
def test_what_has_no_row_is_refused(space, words):
    with pytest.raises(ValueError, match=words):
        ObservationLayout(space)


def test_choices_outside_their_space_are_refused():
    layout = ObservationLayout(spaces.Discrete(3, start=1))
    with pytest.raises(
        ValueError, match="whole number from 1 to 3, and the batch goes from 1 to 4"
    ):
        layout.flat(np.array([1, 4]))


@pytest.mark.parametrize("bad", [[1.5, 0], [np.nan, 0]])
def test_choices_that_are_no_whole_numbers_are_refused(bad):
    with pytest.raises(ValueError, match="must be a whole number from 0 to 2"):
        ObservationLayout(spaces.Discrete(3)).flat(np.array(bad))


@pytest.mark.parametrize("space", [spaces.Box(-1, 1, (2,)), spaces.MultiDiscrete([2, 2])])
def test_observations_of_another_shape_are_refused(space):
    """In a Dict, they would be written over the next part."""
    layout = ObservationLayout(spaces.Dict(a=space, b=spaces.Discrete(9)))
    with pytest.raises(ValueError, match=r"must have shape \(4, 2\), got \(4, 3\)"):
        layout.flat({"a": np.zeros((4, 3)), "b": np.zeros(4)})


def test_two_masks_are_refused():
    space = spaces.Dict(action_mask=spaces.MultiBinary(3), x=spaces.Discrete(2))
    with pytest.raises(ValueError, match="several action masks"):
        ObservationLayout(space, mask=3)
