"""What is drawn, read off the figure that is saved."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy.stats import trim_mean

from rl import plot_learning_curve
from rl.run.plots import bootstrap_interval, iqm, plot_runs


@pytest.fixture(autouse=True)
def figures(monkeypatch):
    """Return a list of the figures that would be saved; to draw them would take long."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    return saved


def columns(returns, kl=None, delta=0.01, first=100):
    n = len(returns)
    return {
        "time/total_timesteps": [first + 100.0 * i for i in range(n)],
        "rollout/ep_rew_mean": list(returns),
        "train/kl_divergence_loss": kl or [0.009] * n,
        "trust/delta": [delta] * n if isinstance(delta, float) else delta,
    }


@pytest.fixture
def run(tmp_path):
    """Return a function that writes a run folder."""

    def run(name, log=None, **config):
        folder, log = tmp_path / name, log or columns([1.0, 2.0, 3.0])
        folder.mkdir()
        options = {"algorithm": "trpo", "env_id": "E-v0", "seed": 0, "delta": 0.01} | config
        (folder / "config.json").write_text(json.dumps(options))
        rows = zip(*log.values(), strict=True)
        lines = [",".join(log), *(",".join(map(str, row)) for row in rows)]
        (folder / "progress.csv").write_text("\n".join(lines))
        return folder

    return run


def test_runs_that_differ_in_the_seed_alone_are_one_curve(run, tmp_path):
    folders = [
        run("a", seed=0),
        run("b", seed=1),
        run("c", delta=0.02),
        run("d", delta=0.02, hidden=[8]),
        run("e", algorithm="vpg", delta=0.02),
        run("f", env_id="F-v0"),
    ]
    assert plot_runs(folders, tmp_path / "runs.png") == {
        "trpo on E-v0, delta=0.01, hidden=None": 2,
        "trpo on E-v0, delta=0.02, hidden=None": 1,
        "trpo on E-v0, delta=0.02, hidden=[8]": 1,
        "vpg on E-v0": 1,
        "trpo on F-v0": 1,
    }


def test_runs_whose_options_are_not_known_stay_apart(run, tmp_path):
    folders = [run("a"), run("b")]
    for folder in folders:
        (folder / "config.json").write_text("[]")
    assert list(plot_runs(folders, tmp_path / "runs.png")) == [str(f) for f in folders]


def test_no_legend_covers_a_curve(run, tmp_path, figures):
    plot_runs([run(f"r{i}", hidden=[i], seed=i) for i in range(9)], tmp_path / "runs.png")
    figures[0].draw_without_rendering()
    (legend,) = figures[0].legends
    box = legend.get_window_extent()
    assert len(legend.texts) == 10  # the runs and delta
    assert not any(box.overlaps(axes.get_tightbbox()) for axes in figures[0].axes)
    assert not any(axes.get_legend() for axes in figures[0].axes)
    assert figures[0].bbox.contains(*box.min)
    assert figures[0].bbox.contains(*box.max)


def test_curves_differ_without_their_colours(run, tmp_path, figures):
    plot_runs([run(f"r{i}", hidden=[i]) for i in range(7)], tmp_path / "runs.png")
    styles = [(line.get_linestyle(), line.get_marker()) for line in figures[0].axes[0].lines]
    assert len(set(styles)) == 7


def test_a_run_of_one_update_is_a_mark(run, tmp_path, figures):
    single = columns([5.0])
    plot_learning_curve(single, tmp_path / "curve.png")
    plot_runs([run("a", single), run("b", single, seed=1)], tmp_path / "runs.png")
    for figure in figures:
        marked = [line for line in figure.axes[0].lines if line.get_marker() not in ("None", None)]
        assert marked
        assert all(line.get_xydata().tolist() == [[100.0, 5.0]] for line in marked)


def test_an_outlier_does_not_flatten_the_kls(tmp_path, figures):
    kl = [0.009, 0.0099, 0.21, 0.0, math.inf, 1e-12]
    plot_learning_curve(columns([1.0] * 6, kl), tmp_path / "curve.png")
    axes = figures[0].axes[1]
    low, high = axes.get_ylim()
    assert (axes.get_yscale(), high) == ("log", 0.42)
    assert 0 < low < 0.009 / 10
    edge = {line.get_marker(): line.get_xydata().tolist() for line in axes.lines[1:3]}
    assert edge == {"v": [[400.0, 0.04], [600.0, 0.04]], "^": [[500.0, 0.96]]}
    labels = [text.get_text() for text in figures[0].legends[0].texts]
    assert labels == ["KL below the axis, such as 0", "KL above the axis", "delta"]


@pytest.mark.parametrize("delta", [0.01, 0.5])
def test_the_bound_is_on_the_axis(tmp_path, figures, delta):
    plot_learning_curve(columns([1.0, 2.0], delta=delta), tmp_path / "curve.png")
    low, high = figures[0].axes[1].get_ylim()
    assert low < min(0.009, delta) < max(0.009, delta) < high


def test_a_bound_that_moves_is_a_curve_and_none_is_none(tmp_path, figures):
    for delta in ([0.02, 0.01], [math.inf, math.inf], [math.nan, math.nan]):
        plot_learning_curve(columns([1.0, 2.0], delta=delta), tmp_path / "curve.png")
    moving, *without = [figure.axes[1].lines for figure in figures]
    assert moving[-1].get_label() == "delta"
    assert moving[-1].get_ydata().tolist() == [0.02, 0.01]
    assert [len(lines) for lines in without] == [1, 1]
    assert not figures[1].legends


def test_the_middle_of_seeds_is_drawn_where_all_have_returns(run, tmp_path, figures):
    logs = [columns([float(i)] * 3, first=100 + 50 * i) for i in range(5)]
    plot_runs([run(f"r{i}", log, seed=i) for i, log in enumerate(logs)], tmp_path / "runs.png")
    middle = figures[0].axes[0].lines[-1]
    assert middle.get_label() == "trpo on E-v0, IQM of 5"
    assert (middle.get_xdata()[[0, -1]] == [300, 300]).all()
    assert np.allclose(middle.get_ydata(), 2.0)


def test_runs_that_share_no_steps_are_told(run, tmp_path, figures):
    logs = [columns([1.0]), columns([2.0], first=500), columns([math.nan])]
    for name, chosen in (("steps", logs[:2]), ("episode", logs[1:])):
        runs = [run(f"{name}{i}", log, seed=i) for i, log in enumerate(chosen)]
        plot_runs(runs, tmp_path / "runs.png")
    labels = [figure.legends[0].texts[0].get_text() for figure in figures]
    assert labels == ["trpo on E-v0: no steps in common", "trpo on E-v0: a run ended no episode"]


def test_a_learning_curve_takes_a_folder_or_a_file(run, tmp_path, figures):
    folder = run("a", columns([1.0, 7.0]))
    for log in (str(folder), folder / "progress.csv"):
        plot_learning_curve(log, str(tmp_path / "new" / "curve.png"), title="mine")
        assert figures[-1].axes[0].lines[0].get_ydata().tolist() == [1.0, 7.0]
        assert figures[-1].axes[0].get_title(loc="left") == "mine"
    with pytest.raises(ValueError, match=r"no .*absent\.csv"):
        plot_learning_curve(tmp_path / "absent.csv")


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40))
def test_the_interquartile_mean_is_that_of_rliable(scores):
    """It calls scipy's trimmed mean."""
    assert iqm(np.array(scores)) == pytest.approx(trim_mean(scores, 0.25), abs=1e-9)


def test_it_works_along_the_first_axis():
    scores = np.arange(12.0).reshape(4, 3)
    assert iqm(scores).tolist() == [4.5, 5.5, 6.5]


def test_the_interval_covers_at_about_its_level():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.normal(size=20), draws=200)
        covered += low <= 0 <= high
    # percentile intervals of twenty are a little short; three standard errors of 200 around 0.9
    assert 0.84 < covered / 200 < 0.99


def test_no_runs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no run folders"):
        plot_runs([], tmp_path / "plot.png")
