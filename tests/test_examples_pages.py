"""What a reader of an example sees first: its help, and where its plot puts the legend."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from examples import FOLDER, load

SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "race")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_the_defaults_and_needs_no_trainer(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    monkeypatch.syspath_prepend(str(FOLDER))
    for trainer in ("lightning", "accelerate"):
        monkeypatch.setitem(sys.modules, trainer, None)  # as if it were not installed
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert end.value.code == 0
    # Every option but --help itself has a default.
    assert shown.count("(default:") == shown.split("options:")[1].count("\n  --")


@pytest.mark.parametrize("name", ["lightning_manual", "accelerate_loop"])
def test_without_its_trainer_it_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = name.split("_")[0]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f"pip install {package}"):
        load(name).main()


def drawn(example: Any, draw: Any, *arguments: Any) -> Figure:
    """Return the figure that a script would save, laid out."""
    figures: list[Figure] = []
    vars(example)["save"] = lambda figure, _: figures.append(figure)
    draw(*arguments, Path())
    (figure,) = figures
    FigureCanvasAgg(figure).draw()
    return figure


@pytest.mark.parametrize("count", [1, 3, 7])
def test_each_axes_of_curve_fitting_has_a_problem(count: int) -> None:
    example = load("curve_fitting")
    fits = {
        (name, 1): example.Fit(example.numbers(problem.certified), 1, 1, 1, 0.0, 11.0)
        for name, problem in list(example.PROBLEMS.items())[:count]
    }
    figure = drawn(example, example.draw, fits)
    assert len(figure.axes) == count
    assert all(ax.has_data() for ax in figure.axes)


@pytest.mark.parametrize("name", ["regressor", "variational"])
def test_the_legend_covers_no_curve(name: str) -> None:
    example = load(name)
    rows = [(0, 0.0, 1.0, 1.0, -0.2, 1.0), (9, 1.0, 0.5, 0.5, -0.1, 0.1)]
    model = example.make_task().model
    runs = {key: [load("race").Run(None, rows, [], model)] for key in example.METHODS}
    figure = drawn(example, example.draw, runs, *([[-1.0, -1.0]] * (name == "regressor")))
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} >= set(example.METHODS)
    box = legend.get_window_extent()
    assert not any(box.overlaps(ax.get_window_extent()) for ax in figure.axes)
    assert all(ax.get_legend() is None for ax in figure.axes)
