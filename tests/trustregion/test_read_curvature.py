"""Curvature reads torch's private graph: a part that is missing or has changed is noticed."""

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.nn import functional as nnf

from trustregion import FisherOperator, GGNOperator, recorded, to_dense
from trustregion.operators import output_hessian
from trustregion.operators.batches import BatchedOperator
from trustregion.preconditioners import KFAC, kfac_layers

F64 = torch.float64
X = torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
LABELS = torch.tensor([0, 1, 2, 1, 1, 0, 2, 2, 1])
CLASSES = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
LOSSES = {
    "mse mean": lambda z: nnf.mse_loss(z, torch.ones_like(z)),
    "mse sum": lambda z: nnf.mse_loss(z, torch.ones_like(z), reduction="sum"),
    "bce mean": lambda z: nnf.binary_cross_entropy_with_logits(z, torch.ones_like(z)),
    "bce sum": lambda z: nnf.binary_cross_entropy_with_logits(
        z, torch.ones_like(z), reduction="sum"
    ),
    "nll mean": lambda z: nnf.cross_entropy(z, LABELS),
    "nll sum": lambda z: nnf.cross_entropy(z, LABELS, reduction="sum"),
    "nll weights": lambda z: nnf.cross_entropy(z, LABELS, CLASSES),
    "nll ignored": lambda z: nnf.cross_entropy(z, LABELS, ignore_index=1),
    "nll weights ignored sum": lambda z: nnf.cross_entropy(
        z, LABELS, CLASSES, ignore_index=2, reduction="sum"
    ),
}
SAVED = {
    "mse": ["reduction"],
    "bce": ["reduction", "weight", "pos_weight"],
    "nll": ["reduction", "weight", "ignore_index", "target", "total_weight", "result", "dim"],
}
READ = [
    (loss, argument)
    for loss in LOSSES
    for argument in SAVED[loss.split()[0]]
    if not (argument == "total_weight" and loss.endswith("sum"))  # not read
]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(output_hessian, "_AGREED", set())
    monkeypatch.setattr(kfac_layers, "_AGREED", set())


@pytest.fixture
def reader(monkeypatch):
    """Replace what a reader of the graph finds under one name."""
    saved = recorded.saved

    def replace(argument, change):
        def changed(node, name):
            value = saved(node, name)
            return change(value) if name == argument else value

        monkeypatch.setattr(recorded, "saved", changed)

    return replace


def missing(_):
    raise recorded.UnreadableNode("renamed")


def ggn(loss):
    torch.manual_seed(2)
    W = torch.randn(4, 3, dtype=F64, requires_grad=True)
    z = X @ W
    return GGNOperator(LOSSES[loss](z), z, [W])


@pytest.fixture(scope="module")
def exact():
    """Return the matrices from a dense Hessian of the losses in the logits."""
    found = {}
    torch.manual_seed(2)
    z = X @ torch.randn(4, 3, dtype=F64)
    J = torch.kron(X, torch.eye(3, dtype=F64))
    for name, loss in LOSSES.items():
        H = torch.autograd.functional.hessian(loss, z).view(27, 27)
        found[name] = J.T @ H @ J
    return found


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_have_closed_forms_that_are_compared_once(loss, exact, monkeypatch):
    compared = []
    compare = output_hessian._compare
    monkeypatch.setattr(
        output_hessian, "_compare", lambda *args: compared.append(1) or compare(*args)
    )
    for _ in range(3):
        G = ggn(loss)
        assert G.output_hessian == "closed form"
        torch.testing.assert_close(to_dense(G), exact[loss], rtol=1e-12, atol=1e-14)
    assert len(compared) == 1


@pytest.mark.parametrize(("loss", "argument"), READ)
def test_a_missing_attribute_of_a_loss_falls_back_to_autograd(loss, argument, exact, reader):
    reader(argument, missing)
    G = ggn(loss)
    assert G.output_hessian == "double backward"
    torch.testing.assert_close(to_dense(G), exact[loss], rtol=1e-12, atol=1e-14)


CHANGES = {
    "reduction": lambda value: 3 - value,
    "ignore_index": lambda value: -100 if value >= 0 else 0,
    "total_weight": lambda value: 2 * value,
    "weight": lambda _: torch.arange(1.0, 4.0, dtype=F64).flip(0),
    "target": lambda value: (value + 1) % 3,
    "result": lambda value: value.exp(),
}
CHANGED = [
    (loss, argument)
    for loss, argument in READ
    if argument in CHANGES
    # labels have no part in the curvature of a loss without weights
    and not (argument == "target" and loss in ("nll mean", "nll sum"))
]


@pytest.mark.parametrize(("loss", "argument"), CHANGED)
def test_a_changed_meaning_of_an_attribute_is_noticed(loss, argument, exact, reader):
    reader(argument, CHANGES[argument])
    G = ggn(loss)
    assert G.output_hessian == "double backward"
    torch.testing.assert_close(to_dense(G), exact[loss], rtol=1e-12, atol=1e-14)


def test_options_that_were_not_met_are_compared_on_their_own(reader, exact):
    assert ggn("nll mean").output_hessian == "closed form"
    reader("ignore_index", lambda value: value if value < 0 else -7)
    assert ggn("nll mean").output_hessian == "closed form"
    torch.testing.assert_close(to_dense(ggn("nll ignored")), exact["nll ignored"])


def test_saturated_outputs_keep_their_closed_form_and_settle_nothing():
    z = torch.tensor([[40.0, -40.0], [35.0, -38.0]], requires_grad=True)
    G = GGNOperator(nnf.binary_cross_entropy_with_logits(z, (z > 0).float()), z, [z])
    assert G.output_hessian == "closed form"
    assert not output_hessian._AGREED
    assert (to_dense(G).diagonal() > 0).all()


def test_running_out_of_memory_is_told(reader):
    def full(_):
        raise torch.OutOfMemoryError("no memory")

    reader("reduction", full)
    with pytest.raises(torch.OutOfMemoryError):
        ggn("mse mean")
    reader("mat1", full)
    with pytest.raises(torch.OutOfMemoryError):
        kfac_of(network())


def network():
    torch.manual_seed(4)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 2, padding=1, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 2)
    )
    return net.double(), torch.randn(40, 2, 5, 5, dtype=F64)


def kfac_of(given):
    net, x = given
    F = FisherOperator(Normal(net(x), 1.0), net.parameters())
    kfac = KFAC(net)
    M = kfac.build(F, 1e-2)
    assert (torch.linalg.eigvalsh(to_dense(M)) > 0).all()
    return kfac.state


def weights_in(state):
    return sorted(state["blocks"])


CONV, LINEAR = 0, 2


def test_layers_are_compared_with_autograd_once(monkeypatch):
    taken = []
    differentiate = kfac_layers.differentiate
    monkeypatch.setattr(
        kfac_layers, "differentiate", lambda *args: taken.append(1) or differentiate(*args)
    )
    for _ in range(3):
        assert weights_in(kfac_of(network())) == [CONV, LINEAR]
    assert len(taken) == 1


@pytest.mark.parametrize(
    ("argument", "left"),
    [("mat1", [CONV]), ("input", [LINEAR]), ("padding", [LINEAR]), ("groups", [LINEAR])],
)
def test_a_layer_that_cannot_be_read_has_no_factors(argument, left, reader):
    whole = kfac_of(network())
    reader(argument, missing)
    state = kfac_of(network())
    assert weights_in(state) == left
    for weight in left:
        torch.testing.assert_close(state["blocks"][weight]["A"], whole["blocks"][weight]["A"])
    sizes = [t.numel() for t in network()[0].parameters()]
    starts = [sum(sizes[:i]) for i in range(5)]
    gone = ({CONV, LINEAR} - set(left)).pop()
    part = slice(starts[gone], starts[gone + 2])
    assert (whole["diagonal"][part] == 0).all()
    assert (state["diagonal"][part] > 0).any()  # estimated instead


@pytest.mark.parametrize(
    ("argument", "change", "left"),
    [
        ("mat1", lambda x: x.roll(1, 0), [CONV]),
        ("mat1", lambda x: 2 * x, [CONV]),
        ("mat1", lambda x: x[1:], [CONV]),
        ("input", lambda x: x.mT, [LINEAR]),
        ("padding", lambda value: tuple(v + 1 for v in value), [LINEAR]),
        ("dilation", lambda value: tuple(2 * v for v in value), [LINEAR]),
    ],
)
def test_a_layer_that_is_read_wrongly_has_no_factors(argument, change, left, reader):
    reader(argument, change)
    assert weights_in(kfac_of(network())) == left


def test_a_graph_that_cannot_be_followed_is_refused_in_words(monkeypatch):
    net, x = network()
    F = FisherOperator(Normal(net(x), 1.0), net.parameters())
    sources = recorded.sources

    def without(node):
        if recorded.name(node) == "AddmmBackward0":
            raise recorded.UnreadableNode("AddmmBackward0 has no attribute next_functions")
        return sources(node)

    monkeypatch.setattr(recorded, "sources", without)
    with pytest.raises(RuntimeError, match="has no attribute"):
        KFAC(net).build(F, 1e-2)


def test_operators_whose_memory_cannot_be_counted_are_not_kept(reader):
    W = torch.zeros(4, 3, dtype=F64, requires_grad=True)
    make = lambda x: FisherOperator(Normal((x @ W).exp(), 1.0), [W], backend="graph")  # noqa: E731
    kept = BatchedOperator(make, list(X.split(3)), cache_bytes=1 << 30)
    kept @ torch.ones(12, dtype=F64)
    assert kept.cached == 3
    reader("result", missing)
    other = BatchedOperator(make, list(X.split(3)), cache_bytes=1 << 30)
    assert torch.equal(other @ torch.ones(12, dtype=F64), kept @ torch.ones(12, dtype=F64))
    assert other.cached == 0
