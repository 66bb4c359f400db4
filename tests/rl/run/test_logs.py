"""Numbers, rows and files of the log."""

import builtins
import csv
import math

import pytest

from rl import PPO, TRPO, CSVLog, Table, TensorBoardLog
from rl.run.logs import number, read_csv
from toys import Clock

SMALL = {"n_envs": 4, "steps_per_update": 64, "hidden": (8,)}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0152, "0.01520"),
        (-0.006, "-0.006000"),
        (0.0, "0.0"),
        (21.40, "21.40"),
        (-165.34, "-165.3"),
        (999.96, "1,000"),
        (1234.5, "1,234"),
        (27_648, "27,648"),
        (7, "7"),
        (98_765_432, "98765432"),
        (1.5e10, "1.500e+10"),
        (-1.5e10, "-1.50e+10"),
        (1.234e-9, "1.234e-09"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers_have_the_digits_that_fit(value, text):
    assert number(value) == text


@pytest.mark.parametrize("exponent", range(-12, 13))
def test_numbers_fit_and_are_right(exponent):
    for sign in (1, -1):
        value = sign * 1.23456 * 10.0**exponent
        text = number(value, 8)
        assert len(text) <= 8
        assert float(text.replace(",", "")) == pytest.approx(value, rel=0.05)


def log(**changes):
    return {
        "time/iterations": 1,
        "time/progress": 1.0,
        "time/total_timesteps": 512,
        "time/fps": 1e4,
        "rollout/ep_rew_mean": 1.0,
        "rollout/ep_len_mean": 1.0,
        "train/kl_divergence_loss": 0.01,
        "train/value_loss": 1.0,
        "trust/rho": 1.0,
        "trust/cg_iterations": 10,
        "trust/backtracks": 0,
        "trust/status": "accepted",
    } | changes


@pytest.mark.parametrize("size", [1e-7, 1.0, 1e15, math.nan, -math.inf])
def test_a_row_has_80_columns_that_stay_apart(capsys, size):
    changes = {key: size * 1.23456789 for key, value in log().items() if isinstance(value, float)}
    changes |= {"time/progress": 1.0, "time/total_timesteps": 123_456_789}
    Table()(None, log(**changes, **{"trust/status": "progress_below_tolerance"}))
    header, row = capsys.readouterr().out.splitlines()
    assert len(header) == len(row) == 80
    assert len(row.split()) == 10


def test_a_return_that_is_not_known_yet_is_a_dash(capsys):
    Table()(None, log(**{"rollout/ep_rew_mean": math.nan, "train/kl_divergence_loss": math.nan}))
    assert capsys.readouterr().out.splitlines()[1].split()[1:4] == ["-", "1.000", "nan"]


def rows(capsys):
    lines = capsys.readouterr().out.splitlines()
    return [int(line.split()[0].replace(",", "")) for line in lines if "steps" not in line]


def show(table, updates, **changes):
    for i in range(1, updates + 1):
        state = {"time/iterations": i, "time/total_timesteps": i, "time/progress": i / updates}
        table(None, log(**state | changes))


@pytest.mark.parametrize("updates", [1, 13, 30, 100, 977])
def test_about_thirty_rows_from_the_first_update_to_the_last(capsys, updates):
    show(Table(), updates)
    shown = rows(capsys)
    assert (shown[0], shown[-1]) == (1, updates)
    assert len(shown) in ({updates} if updates <= 30 else {30, 31})
    assert max(b - a for a, b in zip([0, *shown], shown, strict=False)) <= math.ceil(updates / 30)


def test_the_next_training_has_rows_of_its_own(capsys):
    table = Table()
    show(table, 100)
    first = rows(capsys)
    show(table, 100)
    assert rows(capsys) == first


def test_every_so_many_updates_and_the_last(capsys):
    show(Table(every=3), 7)
    assert rows(capsys) == [3, 6, 7]
    with pytest.raises(ValueError, match="every must be at least 1"):
        Table(0)


def test_a_training_that_ends_early_can_be_finished(capsys):
    table = Table(every=2)
    TRPO(Clock, **SMALL).learn(10_000, False, [table, lambda agent, _: agent.iterations < 3])
    assert rows(capsys) == [96]
    table.finish()
    table.finish()
    assert len(rows(capsys)) == 1


def test_columns_are_those_of_the_algorithm(capsys):
    PPO(Clock, **SMALL).learn(64, False, Table())
    header = capsys.readouterr().out.splitlines()[0]
    assert header.split() == ["steps", "return", "length", "KL", "vf", "loss", "steps/s"]


def test_a_log_takes_a_string_and_makes_its_folder(tmp_path):
    CSVLog(str(tmp_path / "new" / "log.csv"))(None, {"a": 1})
    assert (tmp_path / "new" / "log.csv").read_text() == "a\n1\n"
    with pytest.raises(ValueError, match="is a folder: give the name of a file in it"):
        CSVLog(tmp_path)


def test_a_csv_file_takes_new_columns(tmp_path):
    path = tmp_path / "log.csv"
    log = CSVLog(path)
    log(None, {"a": 1, "b": "x"})
    log(None, {"a": 2, "b": "y", "c": 0.5})
    CSVLog(path)(None, {"a": 3, "b": "z"})
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["a", "b", "c"],
            ["1", "x", ""],
            ["2", "y", "0.5"],
            ["3", "z", ""],
        ]
    columns = read_csv(path)
    assert columns["a"] == [1, 2, 3]
    assert str(columns["c"]) == "[nan, 0.5, nan]"
    assert "b" not in columns


def test_tensorboard_is_asked_for_in_words(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *arguments):
        if name.startswith("torch.utils.tensorboard"):
            raise ModuleNotFoundError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"torch-trustregion\[tensorboard\]"):
        TensorBoardLog(tmp_path)


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    TRPO(lambda: Clock(length=3, truncate=True), **SMALL).learn(
        144, False, TensorBoardLog(tmp_path)
    )
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    kls = events.Scalars("train/kl_divergence_loss")
    assert [event.step for event in kls] == [48, 96, 144]
    assert "trust/status" not in events.Tags()["scalars"]
