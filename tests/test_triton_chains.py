"""Residual blocks, heads and other row operations on Triton, in the interpreter (test_triton_interpreter.py starts it).

Networks, steering rules and the float64 reference are those of the CPU's tests. Fresh workspaces are NaN.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: test_triton_interpreter.py starts it", allow_module_level=True)

from torch import Tensor

from qpilots_fast import SteeredSampler, backends
from qpilots_fast.backends.triton import LaunchTable, TritonBackend, launches
from qpilots_fast.backends.triton.chain_ops import MAX_OPS
from qpilots_fast.backends.triton.counts import num_launches, pack_launches, workspace_bytes
from qpilots_fast.networks import bind
from qpilots_fast.reference import ReferenceNetwork
from qpilots_fast.row_ops import Chain, RowOp
from qpilots_fast.spec import BoundNetwork, NetworkSpec
from qpilots_fast.testing import BFLOAT16_ERROR_OVER_TORCH, TOLERANCES
from tests import test_chains as chains
from tests import test_zoo as zoo
from tests import triton_interpreter
from tests.test_triton_captured import InterpretedGraph
from tests.test_triton_kernels import FLOAT32_ERROR, LARGE_TILES, MANY_TILES, ONE_TILE

triton_interpreter.install()

ROWS = 5


def backend(table: LaunchTable = ONE_TILE, chunk: int | None = None) -> TritonBackend:
    return TritonBackend(table, fill=float("nan"), chunk=chunk, new_graph=lambda device: InterpretedGraph())


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[TritonBackend], None]:
    """Makes a backend the one that samplers find by the name "triton"."""
    choose = backends.choose

    def use(triton: TritonBackend) -> None:
        monkeypatch.setattr(
            backends, "choose", lambda asked: backends.Choice(triton, {}) if asked.name == "triton" else choose(asked)
        )

    use(backend())
    return use


def exact(parts: dict, steering, rows: int = ROWS) -> Tensor:
    return chains.actions(parts, steering, "reference", "float64", *chains.inputs(rows, torch.float64))


def found(parts: dict, steering, rows: int = ROWS, precision: str = "float32") -> Tensor:
    return chains.actions(parts, steering, "triton", precision, *chains.inputs(rows))


HEAD = "symexp of a softmax"


@pytest.mark.parametrize("method", ["U", "identity", "M", "QGF"])
@pytest.mark.parametrize("name", ["pre-norm blocks", HEAD])
def test_samplers(name: str, method: str, use) -> None:
    parts, steering = chains.networks(name, 21), chains.STEERINGS[method]
    torch.testing.assert_close(found(parts, steering).double(), exact(parts, steering), atol=FLOAT32_ERROR, rtol=0)


def compare_network(network: BoundNetwork, film: Tensor | None = None, table: LaunchTable = MANY_TILES) -> None:
    """Output and pull-back of one network, of random inputs, against float64."""
    spec = network.spec
    blocks = [torch.randn(ROWS, spec.block_dim(block)) for block in spec.input_order]
    blocks += [] if film is None else [film]
    output, pull_back = ReferenceNetwork(network, torch.float64)([block.double() for block in blocks])
    cotangent = torch.randn(output.shape, dtype=torch.float32)
    triton, scale = backend(table), dict(atol=FLOAT32_ERROR * max(1.0, float(output.abs().max())), rtol=1e-4)
    torch.testing.assert_close(triton.forward(network, blocks, "float32").double(), output, **scale)
    pulled, expected = triton.vjp(network, blocks, cotangent, "float32"), pull_back(cotangent.double()).sum(0)
    scale = dict(atol=FLOAT32_ERROR * max(1.0, float(expected.abs().max())), rtol=1e-4)
    torch.testing.assert_close(pulled.double(), expected, **scale)


def network_of(made: tuple[Chain, ...], widths: tuple[int, ...], seed: int = 0, kind: str = "critic") -> BoundNetwork:
    """Of two members where it is a critic, with random parameters."""
    members = 2 if kind == "critic" else 1
    spec = NetworkSpec(kind, chains.S, chains.A, widths, num_members=members, chains=made)
    return bind(spec, [parameter.float() for parameter in chains.parameters_of(spec, seed)])


@pytest.mark.parametrize("name", chains.CHAINS)
def test_one_network(name: str) -> None:
    made = chains.CHAINS[name]
    compare_network(network_of(made, (6 if name == "lowest" else 21,) * len(made)))


def random_network(seed: int) -> BoundNetwork:
    """Any operations in any order, of rows whose number of columns changes; blocks end where they can."""
    draw = random.Random(seed)
    numbers = {"leaky_relu": (0.2,), "clamp": (-0.7, 1.2), "layer_norm": (1e-5,), "rms_norm": (1e-5,), "lowest": (5.0,)}
    widths = [draw.choice((12, 33)) for _ in range(draw.randint(1, 4))]
    kept, made = None, []
    for width in widths:
        chain: list[RowOp] = []
        for _ in range(draw.randint(0, MAX_OPS)):
            name = draw.choice(("keep", "add", *numbers, "softmax", "tanh", "relu", "gelu", "elu", "selu", "silu"))
            if (name == "add" and kept != width) or (name == "lowest" and width > 12):
                continue
            kept = width if name == "keep" else kept
            is_norm = name.endswith("norm")
            weight, bias = (is_norm and draw.random() < 0.5 for _ in range(2))
            chain.append(RowOp(name, numbers.get(name, ()), weight, bias))
        made.append(tuple(chain))
    last = (RowOp("softplus"), RowOp("sigmoid"))  # what activation and layer_norm could not say
    return network_of((*made, last), (*widths, 20), seed)


@pytest.mark.parametrize("seed", range(12))
def test_random_chains(seed: int) -> None:
    torch.manual_seed(seed)
    compare_network(random_network(seed))


def test_of_equal_ones_the_first_are_the_lowest() -> None:
    network = network_of(((RowOp("relu"),), (RowOp("lowest", (3.0,)),)), (9, 6))
    layer = network.layers[1]
    for parameter in (*layer.weight, *(layer.bias or ())):
        parameter[1::2] = parameter[::2]
    compare_network(network)


def test_rows_wider_than_a_warp_holds() -> None:
    """300 columns: their power of two is wider than what products read of them."""
    norm = RowOp("layer_norm", (1e-5,), True, True)
    made = ((RowOp("keep"), norm), (RowOp("silu"),), (RowOp("add"), RowOp("rms_norm", (1e-5,))))
    compare_network(network_of(made, (300, 40, 300)), table=ONE_TILE)


def test_one_network_modulated_row_by_row() -> None:
    network = network_of(chains.FILM, (21, 21), kind="flow")
    compare_network(network, torch.randn(ROWS, network.spec.film_dim))


@pytest.mark.parametrize("entry", [e for e in zoo.PACKED if zoo.packed_of(e)[1].spec.chains], ids=lambda e: e.title)
def test_networks_of_the_zoo(entry) -> None:
    network = zoo.packed_of(entry)[1].bound()
    compare_network(network.trunk, torch.randn(ROWS, network.spec.film_dim) if network.spec.film_dim else None)


@pytest.mark.parametrize(
    ("title", "method"),
    [
        ("SimBa SimbaCritic", "U"), ("IDQL LN_Resnet, Mish", "U"), ("TD-MPC2 Q, two-hot symexp, without SimNorm", "M"),
        ("sb3-contrib TQC, truncated critic by critic", "QGF"), ("MaxInfoRL adaptive LayerNorm from t", "U"),
        ("rl_games normalised and clipped inputs", "identity"), ("ReinFlow ResidualMLP with a bounded output", "QGF"),
    ],
)  # fmt: skip
def test_samplers_of_the_zoo(title: str, method: str, use) -> None:
    """The user's own module in float64 says what is right, before and after its weights change."""
    entry = next(entry for entry in zoo.PACKED if entry.title == title)
    (module, network), steering = zoo.packed_of(entry), zoo.STEERINGS[method]
    sampler = zoo.sampler_of(network, entry.kind, steering, backend="triton")
    given = zoo.draws(steering)
    before = sampler(*given)
    assert (before - zoo.exact(module, entry, steering)).abs().max() < 1e-4
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.25)
    after = sampler(*given)
    assert (after - zoo.exact(module, entry, steering)).abs().max() < 1e-4
    assert not torch.equal(before, after)
    zoo.packed_of.cache_clear()


@pytest.mark.parametrize("method", ["U", "GLASS"])
def test_modulation_follows_its_module(method: str, use) -> None:
    """In calls that are launched, and in replays of a graph, which asks the module first."""
    flow = chains.Modulated(NetworkSpec("flow", chains.S, chains.A, (21, 21), chains=chains.FILM), 1)
    parts = {**chains.networks("softmax", 21), "flow": flow}
    sampler = SteeredSampler(flow, parts["critic"], chains.STEERINGS[method], num_steps=4, backend="triton")
    obs, noise = chains.inputs(2)
    eps = torch.randn(4, 2, 2, chains.A, generator=torch.Generator().manual_seed(9), dtype=torch.float64).float()
    given = (obs, noise, *((eps,) if method == "GLASS" else ()))
    results = []
    for _ in range(4):
        results.append(sampler(*given))
        torch.testing.assert_close(
            results[-1].double(), exact(parts, chains.STEERINGS[method], 2), atol=FLOAT32_ERROR, rtol=0
        )
        flow.film.weight.mul_(-1)
    assert not torch.allclose(results[2], results[3])


@pytest.mark.parametrize("name", ["pre-norm blocks", "softmax", "normed blocks"])
def test_bfloat16_is_as_near_as_torchs(name: str, use) -> None:
    parts, steering = chains.networks(name, 40), chains.STEERINGS["U"]
    expected = exact(parts, steering, 33)
    ours = (found(parts, steering, 33, "bfloat16") - expected).abs().mean()
    rounded = chains.actions(parts, steering, "reference", "bfloat16", *chains.inputs(33))
    assert ours <= BFLOAT16_ERROR_OVER_TORCH * (rounded - expected).abs().mean()
    assert ours <= TOLERANCES["bfloat16"].mean_error


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["pre-norm blocks", HEAD])
def test_a_row_does_not_depend_on_its_batch(name: str, precision: str, use, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_dot", triton_interpreter.product_in_fixed_order)
    use(backend(LARGE_TILES))
    parts = chains.networks(name, 21)
    obs, noise = chains.inputs(21)
    whole = chains.actions(parts, chains.STEERINGS["U"], "triton", precision, obs, noise)
    for rows in (slice(0, 1), slice(17, 20)):
        part = chains.actions(parts, chains.STEERINGS["U"], "triton", precision, obs[rows], noise[rows])
        assert torch.equal(part, whole[rows])


def test_rows_in_chunks(use) -> None:
    use(backend(MANY_TILES, chunk=17))
    parts, steering = chains.networks(HEAD, 21), chains.STEERINGS["U"]
    torch.testing.assert_close(
        found(parts, steering, 37).double(), exact(parts, steering, 37), atol=FLOAT32_ERROR, rtol=0
    )


def test_launches_weights_and_memory(use) -> None:
    """Launches and bytes as counted; norms are read at every call, and frozen ones are not."""
    triton = backend()
    use(triton)
    parts, steering = chains.networks("pre-norm blocks", 21), chains.STEERINGS["U"]
    sampler = SteeredSampler(parts["flow"], parts["critic"], steering, num_steps=4, backend="triton")
    frozen = SteeredSampler(parts["flow"], parts["critic"], steering, num_steps=4, backend="triton").freeze()
    obs, noise = chains.inputs(ROWS)
    launches.reset()
    before = sampler(obs, noise)
    plan = triton.plan(sampler._run.spec, torch.device("cpu"))
    assert launches.by_name == num_launches(plan, ROWS) + pack_launches(plan)
    assert num_launches(plan, ROWS)["chain"] == 4 * 3 + 3 * 3 * 3  # relu and gelu are the product's
    assert workspace_bytes(plan, ROWS) == plan.workspace(ROWS).nbytes
    assert torch.equal(frozen(obs, noise), before)
    for parameter in parts["critic"].flat:
        parameter.add_(0.3)
    after = sampler(obs, noise)
    torch.testing.assert_close(after.double(), exact(parts, steering), atol=FLOAT32_ERROR, rtol=0)
    assert torch.equal(frozen(obs, noise), before) and not torch.allclose(after, before)
