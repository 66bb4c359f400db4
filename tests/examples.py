"""The scripts of docs/examples as modules, in their short form."""

import contextlib
import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

FOLDER = Path(__file__).parents[1] / "docs" / "examples"


class Outcome(NamedTuple):
    """What a script did."""

    example: ModuleType
    runs: dict[str, Any]
    plot: Path
    stdout: str
    stderr: str


def load(name: str) -> ModuleType:
    """Import a script, which finds its neighbours as when it is run."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(
    name: str, folder: Path, *, constants: dict[str, Any] | None = None, **options: Any
) -> Outcome:
    """Run a script's main, with other constants of its module where they are given."""
    example, plot = load(name), folder / "plot.png"
    vars(example).update(constants or {})
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        runs = example.main(plot=plot, quiet=True, **options)
    return Outcome(example, runs, plot, stdout.getvalue(), stderr.getvalue())


def check_output(outcome: Outcome) -> None:
    """The plot is there, the table has every method, and no progress bar was shown."""
    content = outcome.plot.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000
    assert all(outcome.stdout.count(name) >= 2 for name in outcome.runs)
    assert outcome.stderr == ""
