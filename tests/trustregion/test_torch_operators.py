"""All operators of torch's own database, linearised."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # two to six minutes
# What a refusal says: there is nothing to differentiate, it cannot be done twice, or what can.
CLEAR = ("do not depend on the parameters", "cannot be differentiated twice", 'use backend="graph"')
# Operators that cannot be asked, since they read memory next to their argument.
SKIPPED = {"as_strided.partial_views"}


@pytest.fixture(scope="module")
def found():
    """Return the outcomes of the samples of each operator for each backend."""
    pytest.importorskip("expecttest", reason="torch's database of operators needs expecttest")
    program = Path(__file__).parents[1] / "torch_operators.py"
    command = [sys.executable, "-W", "ignore", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_every_operator_was_asked(found):
    assert {name for name, entry in found.items() if "error" in entry} == SKIPPED
    assert sum(bool(entry["auto"]) for entry in found.values()) > 500


@pytest.mark.parametrize("backend", ["auto", "tape", "graph"])
def test_no_operator_is_silently_wrong(found, backend):
    verdicts = [(name, text) for name, entry in found.items() for text in entry[backend]]
    assert not [pair for pair in verdicts if pair[1].startswith("wrong")]
    refused = [pair for pair in verdicts if pair[1].startswith("refused")]
    assert not [pair for pair in refused if not any(words in pair[1].lower() for words in CLEAR)]


def test_most_operators_are_right(found):
    kinds = Counter(text.split(":")[0] for entry in found.values() for text in entry["auto"])
    assert kinds["tape"] > 450
    assert kinds["graph"] > 25
    assert kinds["refused"] < 60
