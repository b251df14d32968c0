"""Structures beyond plain MLPs: residual blocks, heads, norms, modulation: each backend against torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qpilots_fast import SteeredSampler, Steering, backends
from qpilots_fast.activations import ACTIVATIONS
from qpilots_fast.networks import PackableNetwork, bind
from qpilots_fast.reference import ReferenceNetwork
from qpilots_fast.row_ops import ROW_OPS, RowOp, plain_layer
from qpilots_fast.spec import NetworkSpec, OwnColumns, network_spec_from_json
from qpilots_fast.testing import TOLERANCES

S, A, B = 5, 3, 7

# name -> one chain a hidden layer of 6 units
CHAINS: dict[str, tuple[tuple[RowOp, ...], ...]] = {
    "an activation a layer": ((RowOp("tanh"),), (RowOp("mish"),)),
    "leaky_relu": ((RowOp("leaky_relu", (0.1,)),), (RowOp("leaky_relu", (0.2,)),)),
    "clamp": ((RowOp("clamp", (-0.5, 0.25)),),),
    "rms_norm": ((RowOp("rms_norm", (1e-6,), True), RowOp("relu")), (RowOp("silu"), RowOp("rms_norm", (1e-5,)))),
    "two norms": (
        (RowOp("layer_norm", (1e-5,), True, True), RowOp("tanh"), RowOp("layer_norm", (1e-6,), False, True)),
    ),
    "pre-norm blocks": (
        (RowOp("keep"), RowOp("layer_norm", (1e-5,), True, True)),
        (RowOp("relu"),),
        (RowOp("add"), RowOp("keep"), RowOp("layer_norm", (1e-5,), True, True)),
        (RowOp("gelu"),),
        (RowOp("add"), RowOp("layer_norm", (1e-6,), True, False)),
    ),
    "normed blocks": (
        (RowOp("layer_norm", (1e-5,), True, True), RowOp("relu"), RowOp("keep")),
        (RowOp("layer_norm", (1e-5,), True, True), RowOp("relu")),
        (RowOp("layer_norm", (1e-5,), True, True), RowOp("add"), RowOp("keep")),
        (RowOp("silu"), RowOp("add")),
    ),
    "activation before the block": (
        (RowOp("keep"), RowOp("mish")), (RowOp("mish"),), (RowOp("add"), RowOp("keep"), RowOp("mish")),
        (RowOp("add"), RowOp("tanh")),
    ),
    "softmax": ((RowOp("relu"),), (RowOp("softmax"),)),
    "symexp of a softmax": ((RowOp("softmax"),), (RowOp("symexp"),)),
    "lowest": ((RowOp("relu"),), (RowOp("lowest", (4,)),)),
    "no operation": ((), (RowOp("relu"),)),
}  # fmt: skip


def spec_of(chains: tuple[tuple[RowOp, ...], ...], kind: str = "critic", members: int = 2, **fields) -> NetworkSpec:
    time = {} if kind == "critic" else {"time_embedding": "raw"}
    return NetworkSpec(kind, S, A, (6,) * len(chains), num_members=members, chains=chains, **time, **fields)


def parameters_of(spec: NetworkSpec, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64) / (shape[-1] ** 0.5 if len(shape) > 1 else 2)
        for shape in spec.parameter_shapes
    ]


def torch_chain(chain, z: Tensor, vectors, kept: Tensor | None, film) -> tuple[Tensor, Tensor | None]:
    """The chain in torch's own functions; vectors and film are iterators."""
    F = torch.nn.functional
    for op in chain:
        if op.name == "keep":
            kept = z
        elif op.name == "add":
            z = z + kept
        elif op.name == "film":
            scale, shift = next(film)
            z = z * scale + shift
        elif op.name in ("layer_norm", "rms_norm"):
            weight = next(vectors) if op.weight else None
            bias = next(vectors) if op.bias else None
            norm = F.layer_norm if op.name == "layer_norm" else F.rms_norm
            z = norm(z, (z.shape[-1],), eps=op.numbers[0])
            z = z if weight is None else z * weight
            z = z if bias is None else z + bias
        elif op.name == "softmax":
            z = z.softmax(-1)
        elif op.name == "lowest":
            kept_values = z.sort(-1).values[..., : int(op.numbers[0])]
            z = torch.where(z <= kept_values[..., -1:], z, torch.zeros_like(z))
        elif op.name == "leaky_relu":
            z = F.leaky_relu(z, op.numbers[0])
        elif op.name == "clamp":
            z = z.clamp(*op.numbers)
        else:
            z = ACTIVATIONS[op.name].function(z)
    return z, kept


def in_torch(spec: NetworkSpec, flat: list[Tensor], columns: Tensor, film=()) -> Tensor:
    """[E, B, out] by torch's own functions, differentiable."""
    copies, films = spec.num_members, iter(film)
    outputs = []
    for member in range(copies):
        mine = iter(flat[member::copies])
        h, kept = columns, None
        films = iter(film)
        for chain in (*spec.row_chains, None):
            weight, bias = next(mine), next(mine)
            h = h @ weight.T + bias
            if chain is not None:
                h, kept = torch_chain(chain, h, mine, kept, films)
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("name", CHAINS)
def test_reference_against_autograd(name: str) -> None:
    spec = spec_of(CHAINS[name])
    flat = parameters_of(spec)
    columns = torch.randn(B, S + A, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    theirs = in_torch(spec, flat, columns)
    cotangent = torch.randn(theirs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (their_grad,) = torch.autograd.grad(theirs, columns, cotangent)
    output, pull_back = ReferenceNetwork(bind(spec, flat), torch.float64)([columns.detach()])
    torch.testing.assert_close(output, theirs.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pull_back(cotangent).sum(0), their_grad, rtol=1e-9, atol=1e-10)


def test_film_in_the_reference() -> None:
    chains = ((RowOp("film"), RowOp("silu"), RowOp("keep")), (RowOp("film"), RowOp("mish"), RowOp("add")))
    spec = spec_of(chains, members=1)
    assert spec.film_dim == 2 * 6 * 2
    flat = parameters_of(spec)
    film = torch.randn(B, spec.film_dim, dtype=torch.float64)
    columns = torch.randn(B, S + A, dtype=torch.float64, requires_grad=True)
    parts = film.split(6, 1)
    theirs = in_torch(spec, flat, columns, [(parts[0], parts[1]), (parts[2], parts[3])])
    (their_grad,) = torch.autograd.grad(theirs.sum(), columns)
    output, pull_back = ReferenceNetwork(bind(spec, flat), torch.float64)([columns.detach(), film])
    torch.testing.assert_close(output, theirs.detach())
    torch.testing.assert_close(pull_back(torch.ones_like(output)).sum(0), their_grad)


def test_what_activation_and_layer_norm_can_say_is_said_so() -> None:
    norm = RowOp("layer_norm", (1e-5,), True, False)
    spec = spec_of(((norm, RowOp("relu")), (RowOp("relu"), norm), (RowOp("relu"),)))
    assert not spec.chains and spec.activation == "relu" and spec.layer_norm == ("pre", "post", None)
    assert (spec.layer_norm_eps, spec.norm_weight, spec.norm_bias) == (1e-5, True, False)
    assert [plain_layer(chain) for chain in spec.row_chains] == [
        ("relu", "pre", norm), ("relu", "post", norm), ("relu", None, None),
    ]  # fmt: skip


def test_json_keeps_chains() -> None:
    spec = spec_of(CHAINS["pre-norm blocks"])
    again = network_spec_from_json(spec.json)
    assert again == spec and hash(again) == hash(spec) and again.row_chains == spec.row_chains


@pytest.mark.parametrize(
    "chains, message",
    [
        (((RowOp("sine"),),), "'sine'; expected one of leaky_relu"),
        (((RowOp("clamp", (1.0,)),),), "expected 2 numbers"),
        (((RowOp("add"),),), "none was kept"),
        (((RowOp("lowest", (9,)),),), "from 1 to the layer's width 6"),
    ],
)
def test_what_no_network_can_have_is_refused(chains, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec_of(chains)


def test_kept_rows_must_be_as_wide() -> None:
    with pytest.raises(ValueError, match="the row kept last has 4 numbers"):
        NetworkSpec("critic", S, A, (4, 6), chains=((RowOp("keep"), RowOp("relu")), (RowOp("add"),)))


def test_the_table_of_chains_has_every_operation() -> None:
    used = {op.kind for chains in CHAINS.values() for chain in chains for op in chain}
    assert used == set(ROW_OPS) - {"film"}


# ---------------------------------------------------------------- backends


class Packed(PackableNetwork):
    """A network that is its spec and its parameters."""

    def __init__(self, spec: NetworkSpec, seed: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.flat = torch.nn.ParameterList(p.float() for p in parameters_of(spec, seed)).requires_grad_(False)

    def flat_parameters(self) -> list[Tensor]:
        return list(self.flat)


class Film(OwnColumns):
    """Scale and shift of every "film" from a time, by a Linear and a tanh."""

    def __init__(self, dim: int) -> None:
        self.weight = torch.randn(dim, 1, generator=torch.Generator().manual_seed(3))

    def film(self, t: Tensor) -> Tensor:
        return torch.tanh(t @ self.weight.to(t.dtype).T)

    def obs(self, obs: Tensor) -> Tensor:
        raise AssertionError("not asked")

    times = actions = obs  # type: ignore[assignment]

    def followed(self) -> list[Tensor]:
        return [self.weight]


class Modulated(Packed):
    """A flow with "film" operations."""

    def __init__(self, spec: NetworkSpec, seed: int = 0) -> None:
        super().__init__(spec, seed)
        self.film = Film(spec.film_dim)

    def bound(self):
        bound = super().bound()
        if self.__dict__.get("_with_own", (None,))[0] is not bound:
            self.__dict__["_with_own"] = (bound, replace(bound, own=self.film))
        return self.__dict__["_with_own"][1]


CPU = pytest.mark.skipif(backends.unavailable_reason("cpu") is not None, reason="the CPU backend is not built")
STEERINGS = {
    "U": Steering.qpilots_u(),
    "identity": Steering.qpilots_u(jacobian="identity"),
    "M": Steering.qpilots_m(num_samples=2),
    "QGF": Steering.qgf(weight=0.3),
    "GLASS": replace(Steering.qpilots_m(num_samples=2), estimate="glass", glass_steps=2),
}
FILM = ((RowOp("film"), RowOp("silu"), RowOp("keep")), (RowOp("film"), RowOp("mish"), RowOp("add")))


def networks(name: str, width: int) -> dict[str, Packed]:
    """A flow, critics and a map of one structure, of hidden layers as wide as this."""

    def widened(spec: NetworkSpec) -> NetworkSpec:
        return replace(spec, hidden_dims=(width,) * len(spec.hidden_dims))

    chains = CHAINS[name]
    return {
        "flow": Packed(widened(spec_of(chains, "flow", 1)), 1),
        "critic": Packed(widened(spec_of(chains, "critic", 3)), 2),
        "posterior": Packed(widened(spec_of(chains, "meta_flow_map", 1)), 3),
    }


def actions(parts: dict, steering: Steering, backend: str, precision: str, obs: Tensor, noise: Tensor) -> Tensor:
    parts = dict(parts)
    posterior = parts.pop("posterior") if steering.estimate == "mfm" else None
    sampler = SteeredSampler(
        **{"flow": parts["flow"], "critic": parts["critic"]}, steering=steering, posterior=posterior, num_steps=4,
        backend=backend, precision=precision, action_low=-1.0, action_high=1.0,
    )  # fmt: skip
    eps = None
    if steering.uses_posterior:
        draw = torch.Generator().manual_seed(9)
        eps = torch.randn(4, len(obs), 2, A, generator=draw, dtype=torch.float64).to(noise.dtype)
    return sampler(obs, noise, eps)


def inputs(batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(4)
    return torch.randn(batch, S, generator=draw).to(dtype), torch.randn(batch, A, generator=draw).to(dtype)


@CPU
@pytest.mark.parametrize("method", STEERINGS)
@pytest.mark.parametrize("name", CHAINS)
def test_samplers_on_the_cpu(name: str, method: str) -> None:
    width = 6 if name == "lowest" else 21
    parts = networks(name, width)
    obs, noise = inputs(17)
    expected = actions(parts, STEERINGS[method], "reference", "float64", *inputs(17, torch.float64))
    found = actions(parts, STEERINGS[method], "cpu", "float32", obs, noise)
    assert (found - expected).abs().max() <= TOLERANCES["float32"].max_error
    alone = actions(parts, STEERINGS[method], "cpu", "float32", obs[:1], noise[:1])
    if not STEERINGS[method].uses_posterior:  # whose noise is drawn for the batch
        assert torch.equal(alone[0], found[0])


@CPU
@pytest.mark.parametrize("name", ["pre-norm blocks", "softmax", "normed blocks"])
def test_bfloat16_is_as_near_as_torchs(name: str) -> None:
    parts = networks(name, 64)
    obs, noise = inputs(257)
    expected = actions(parts, STEERINGS["U"], "reference", "float64", *inputs(257, torch.float64))
    ours = (actions(parts, STEERINGS["U"], "cpu", "bfloat16", obs, noise) - expected).abs().mean()
    rounded = (actions(parts, STEERINGS["U"], "reference", "bfloat16", obs, noise) - expected).abs().mean()
    assert ours <= 1.5 * rounded and ours <= TOLERANCES["bfloat16"].mean_error


@CPU
@pytest.mark.parametrize("name", CHAINS)
def test_one_network_and_its_pullback_on_the_cpu(name: str) -> None:
    cpu = backends.get("cpu")
    spec = spec_of(CHAINS[name])
    flat = parameters_of(spec)
    network = bind(spec, [p.float() for p in flat])
    obs, act = inputs(B)
    output, pull_back = ReferenceNetwork(bind(spec, flat), torch.float64)([obs.double(), act.double()])
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(cpu.forward(network, [obs, act], "float32").double(), output, rtol=2e-5, atol=2e-5)
    pulled = cpu.vjp(network, [obs, act], cotangent, "float32").double()
    torch.testing.assert_close(pulled, pull_back(cotangent.double()).sum(0), rtol=5e-5, atol=5e-5)


@CPU
@pytest.mark.parametrize("method", ["U", "GLASS"])
def test_film_on_the_cpu(method: str) -> None:
    flow = Modulated(NetworkSpec("flow", S, A, (21, 21), chains=FILM), 1)
    parts = {**networks("softmax", 21), "flow": flow}
    obs, noise = inputs(3)

    def compare() -> Tensor:
        expected = actions(parts, STEERINGS[method], "reference", "float64", *inputs(3, torch.float64))
        found = actions(parts, STEERINGS[method], "cpu", "float32", obs, noise)
        assert (found - expected).abs().max() <= TOLERANCES["float32"].max_error
        return found

    before = compare()
    flow.film.weight.mul_(-1)
    assert not torch.allclose(compare(), before)


@CPU
def test_norms_of_chains_are_live_and_freeze() -> None:
    parts = networks("pre-norm blocks", 21)
    obs, noise = inputs(3)
    sampler = SteeredSampler(parts["flow"], parts["critic"], STEERINGS["U"], num_steps=4, backend="cpu")
    for _ in range(3):
        before = sampler(obs, noise)
    frozen = SteeredSampler(parts["flow"], parts["critic"], STEERINGS["U"], num_steps=4, backend="cpu").freeze()
    assert torch.equal(frozen(obs, noise), before)
    norms = [p for p, shape in zip(parts["critic"].flat, parts["critic"].spec.parameter_shapes) if len(shape) == 1]
    for vector in norms:
        vector.add_(0.3)
    after = sampler(obs, noise)
    expected = actions(parts, STEERINGS["U"], "reference", "float64", *inputs(3, torch.float64))
    assert (after - expected).abs().max() <= TOLERANCES["float32"].max_error
    assert not torch.allclose(after, before) and torch.equal(frozen(obs, noise), before)
