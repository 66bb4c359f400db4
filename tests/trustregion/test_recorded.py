"""Private parts of torch's graph: one file reads them, and a missing one is told."""

import ast
from pathlib import Path

import pytest
import torch

from trustregion import recorded

ROOT = Path(__file__).parents[2] / "trustregion"
PRIVATE = {
    "next_functions", "variable", "_input_metadata", "_forward_cls", "mkldnn", "_linear_pointwise",
    "BackwardCFunction", "once_differentiable", "_backward_hooks",
    "_post_accumulate_grad_hooks",
}  # fmt: skip
ALLOWED = {"recorded.py"}


def words(tree):
    """Yield the attributes, imported names and string constants of a file, docstrings apart."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.name, alias.name) for alias in node.names)
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
        ):
            yield node.value, node.value


def private(path):
    for word, whole in words(ast.parse(path.read_text())):
        named = word in PRIVATE or word.startswith(("_saved_", "_raw_saved_"))
        if named and not whole.startswith("torch.backends."):  # a public switch
            yield word


@pytest.mark.parametrize(
    "path", sorted(ROOT.rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_one_file_reads_the_private_parts_of_torch(path):
    if path.relative_to(ROOT).as_posix() not in ALLOWED:
        assert not list(private(path))


def test_the_search_finds_them():
    assert set(private(ROOT / "recorded.py")) >= {"next_functions", "_input_metadata", "_saved_"}


def test_what_a_node_tells():
    x = torch.ones(2, 3, requires_grad=True)
    node = x.select(-1, -2).grad_fn
    assert recorded.name(node) == "SelectBackward0"
    assert (recorded.saved(node, "dim"), recorded.saved(node, "index")) == (-1, -2)
    assert recorded.saved_names(node) == ("dim", "index", "self_sym_sizes")
    assert recorded.outputs(node) == (
        recorded.Place(torch.Size([2]), torch.float32, torch.device("cpu")),
    )
    ((source, position),) = recorded.sources(node)
    assert position == 0
    assert recorded.leaf(source) is x
    assert recorded.leaf(node) is None


def test_numbers_come_with_their_sign():
    x = torch.ones(2, 3, requires_grad=True)
    assert recorded.saved(x.softmax(-1).grad_fn, "dim") == -1
    assert recorded.saved(x.permute(-1, 0).grad_fn, "dims") == (-1, 0)


@pytest.mark.parametrize(
    "read",
    [
        lambda node: recorded.saved(node, "nothing"),
        lambda _: recorded.sources(object()),
        lambda _: recorded.outputs(object()),
        lambda _: recorded.name(object()),
        lambda _: recorded.leaf(type("AccumulateGrad", (), {})()),
    ],
)
def test_a_missing_attribute_is_told(read):
    node = torch.ones(1, requires_grad=True).exp().grad_fn
    with pytest.raises(recorded.UnreadableNode, match="has no attribute"):
        read(node)
