"""Films, and environments that give no pictures for them."""

import sys
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
from PIL import Image

from rl import TRPO, record
from rl.run.cli import main
from toys import Clock

SMALL = {"n_envs": 2, "steps_per_update": 8, "hidden": (4,)}
PICTURE = np.zeros((6, 8, 3), np.uint8)


class Film(Clock):
    """Shows its time as a grey."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 # gymnasium's way

    def __init__(self, render_mode=None, length=3):
        super().__init__(length)
        self.render_mode = render_mode

    def render(self):
        return PICTURE + np.uint8(50 * self.time)


def refusing(self, render_mode=None):
    if render_mode is not None:
        raise AssertionError  # without a word, as a bare assert
    Clock.__init__(self)


KINDS = {
    "no-render-mode": ({"__init__": lambda self: Clock.__init__(self)}, "unexpected keyword"),
    "text-only": (
        {"metadata": {"render_modes": ["ansi"]}, "render": lambda _: "x"},
        "returned str|unsupported render mode",
    ),
    "asserting": ({"__init__": refusing}, "AssertionError"),
    "not-written": ({"render": gymnasium.Env.render}, "NotImplementedError"),
    "broken": ({"render": lambda _: 1 / 0}, "division by zero"),
    "nothing": ({"render": lambda _: None}, "returned NoneType"),
    "floats": ({"render": lambda _: PICTURE / 2}, r"returned float64 of shape \(6, 8, 3\)"),
    "grey": ({"render": lambda _: PICTURE[..., :1]}, r"returned uint8 of shape \(6, 8, 1\)"),
    "lists": ({"render": lambda _: PICTURE.tolist()}, "returned list"),
}


@pytest.fixture
def agent():
    return TRPO(Film, **SMALL)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(gymnasium.envs.registration, "registry", {})
    return gymnasium.register


@pytest.mark.parametrize("kind", KINDS)
def test_an_environment_without_pictures_is_one_sentence(kind, registered, tmp_path, capsys):
    parts, words = KINDS[kind]
    registered("NoFilm-v0", entry_point=type("NoFilm", (Film,), parts))
    agent = TRPO("NoFilm-v0", **SMALL)
    for env in ("NoFilm-v0", lambda **options: gymnasium.make("NoFilm-v0", **options)):
        with pytest.raises(ValueError, match=f"^cannot [^\n]*({words})"):
            record(agent, env, tmp_path / "film.gif")
    agent.save(tmp_path / "checkpoint.zip")
    assert main(["record", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.glob("*.gif"))


def test_a_gif_of_whole_episodes_shows_each_state_an_action_was_chosen_in(agent, tmp_path):
    file = str(tmp_path / "new" / "film.gif")
    assert record(agent, Film, file, episodes=2) == [3.0, 3.0]
    with Image.open(file) as film:
        assert (film.n_frames, film.info["duration"]) == (6, 100)
        greys = []
        for i in range(6):
            film.seek(i)
            greys.append(film.convert("RGB").getpixel((0, 0))[0])
    assert greys == [0, 50, 100, 0, 50, 100]


def test_a_film_that_is_full_ends_within_an_episode(agent, tmp_path):
    assert record(agent, Film, tmp_path / "film.gif", episodes=3, max_frames=4) == [3.0]
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 4


def test_a_function_need_not_know_of_render_modes(agent, tmp_path):
    assert record(agent, lambda: Film("rgb_array", length=2), tmp_path / "film.gif") == [2.0]


def test_a_predictor_of_another_package_is_filmed(tmp_path):
    class First:
        def predict(self, obs, deterministic=False):
            return np.zeros(len(obs), np.int64), None

    assert record(First(), Film, tmp_path / "film.gif") == [3.0]


def test_what_cannot_be_filmed_is_refused(agent, tmp_path):
    for path, words in (("film.avi", r"as \.gif or \.mp4"), ("", "is a folder")):
        with pytest.raises(ValueError, match=words):
            record(agent, Film, tmp_path / path)
    with pytest.raises(ValueError, match="max_frames must be at least 1"):
        record(agent, Film, tmp_path / "film.gif", max_frames=0)
    with pytest.raises(TypeError, match="an id or a function that makes an environment"):
        record(agent, Film(), tmp_path / "film.gif")


def test_mp4_is_written_by_ffmpeg_or_refused_before_anything_is_played(
    agent, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ValueError, match="pip install imageio-ffmpeg"):
        record(agent, lambda: 1 / 0, tmp_path / "film.mp4")
    written = []

    def write_frames(path, size, fps, macro_block_size):
        written.append((path, size, fps))
        while True:
            written.append((yield))

    stand_in = SimpleNamespace(write_frames=write_frames)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", stand_in)
    record(agent, Film, tmp_path / "film.mp4")
    assert written[0] == (str(tmp_path / "film.mp4"), (8, 6), 10)
    assert [int(frame[0, 0, 0]) for frame in written[1:]] == [0, 50, 100]


def test_frames_are_kept_when_the_environment_draws_into_them(agent, tmp_path):
    class Canvas(Film):
        picture = PICTURE.copy()

        def render(self):
            self.picture[:] = 50 * self.time
            return self.picture

    record(agent, Canvas, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 3
        assert film.convert("RGB").getpixel((0, 0)) == (0, 0, 0)


def test_no_step_of_a_film_is_a_mere_reset(agent, tmp_path):
    steps = []

    class Counted(Film):
        def step(self, action):
            steps.append(self.time)
            return super().step(action)

    record(agent, Counted, tmp_path / "film.gif", episodes=2)
    assert steps == [0, 1, 2, 0, 1, 2]
