"""The native CPU backend by itself: every instruction-set path, what only it promises, and its guards."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from qpilots_fast import networks
from qpilots_fast.activations import ACTIVATIONS
from qpilots_fast.backends import Call, native
from qpilots_fast.backends.cpu import CpuBackend
from qpilots_fast.backends.reference import ReferenceBackend
from qpilots_fast.spec import BoundNetworks, SamplerSpec
from qpilots_fast.steering import Steering
from qpilots_fast.testing import BFLOAT16_ERROR_OVER_TORCH, assert_close, compare

if native.import_failure() is not None:
    pytest.skip(native.import_failure(), allow_module_level=True)

PATHS = native.load_module().cpu_isa_paths()

# settings that take different code: (steering, flow norm, critic norm, activation, hidden widths, members)
CASES = {
    "u": (Steering.qpilots_u(), None, "post", "gelu_tanh", (64, 64), 3),
    "u_odd": (Steering.qpilots_u(), "pre", ("pre", None, "post"), "silu", (37, 50, 1), 3),
    # layers that are summed in more than one piece
    "u_wide": (Steering.qpilots_u(), None, "post", "gelu_tanh", (272, 560), 2),
    "identity": (Steering.qpilots_u(jacobian="identity"), "post", None, "mish", (33,), 1),
    "m": (Steering.qpilots_m(), None, "post", "gelu", (80, 64), 4),
    "m_masked": (
        Steering(estimate="mfm", num_samples=5, q_scale="batch_std", steered_dims=(0, 2), clip="masked"),
        "post", "post", "tanh", (48, 40), 2,
    ),
    "qgf": (Steering.qgf(0.3), None, "pre", "tanh", (48, 31), 2),
    "qgf_jacobian": (replace(Steering.qgf(0.3), jacobian="full"), None, "pre", "relu", (130, 31), 2),
    "noisy": (Steering.noisy(0.3), None, "post", "gelu_tanh", (64,), 3),
    "gaf": (Steering.gaf(), None, "post", "gelu_tanh", (64, 40), 3),
    "glass": (Steering(estimate="glass", num_samples=3, glass_steps=3), None, "post", "gelu_tanh", (64, 40), 3),
    "unsteered": (Steering.unsteered(), None, "post", "gelu_tanh", (64, 40), 3),
}  # fmt: skip


def build(name: str, batch: int, precision: str = "float32", obs_dim: int = 11, action_dim: int = 5, seed: int = 0):
    """(spec, networks, obs, noise, posterior noise) of one case."""
    steering, flow_norm, critic_norm, activation, widths, members = CASES[name]
    torch.manual_seed(seed)
    flow = networks.FlowMLP(obs_dim, action_dim, widths, activation, flow_norm)
    critic = networks.CriticEnsemble(obs_dim, action_dim, members, widths, activation, critic_norm)
    posterior = None
    if steering.estimate == "mfm":
        posterior = networks.MetaFlowMap(obs_dim, action_dim, widths, activation, flow_norm)
    steps = 4
    bound = BoundNetworks(flow.bound(), critic.bound(), posterior.bound() if posterior else None)
    spec = SamplerSpec(flow.spec, critic.spec, posterior.spec if posterior else None, steering, steps, precision)
    draws = torch.randn(steps, batch, steering.num_samples, action_dim) if steering.uses_posterior else None
    return spec, bound, torch.randn(batch, obs_dim), torch.randn(batch, action_dim), draws


def reference(spec, bound, obs, noise, draws):
    exact = replace(spec, precision="float64")
    draws = None if draws is None else draws.double()
    return ReferenceBackend().sample(Call(exact, bound, obs.double(), noise.double(), draws, return_info=True))


@pytest.fixture
def backend():
    return CpuBackend()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CASES)
def test_every_path_matches_float64(backend, monkeypatch, path, name):
    monkeypatch.setenv(native.ISA_VARIABLE, path)
    for batch in (1, 17, 70):
        args = build(name, batch)
        raw, exact = backend.sample(Call(*args, return_info=True)), reference(*args)
        assert_close(raw.actions, exact.actions)
        torch.testing.assert_close(
            raw.report.gradient_norms.double(), exact.report.gradient_norms, rtol=1e-3, atol=1e-6
        )
        assert not raw.report.nonfinite.any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["u", "u_odd", "m", "qgf_jacobian", "glass"])
def test_bfloat16_is_as_accurate_as_torch(backend, monkeypatch, path, name):
    monkeypatch.setenv(native.ISA_VARIABLE, path)
    args = build(name, 64, "bfloat16")
    exact = reference(*args).actions
    ours, torchs = (compare(b.sample(Call(*args)).actions, exact, "bfloat16") for b in (backend, ReferenceBackend()))
    assert ours.passed, ours.words
    assert ours.mean_error <= BFLOAT16_ERROR_OVER_TORCH * torchs.mean_error


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["u", "u_odd", "u_wide", "m", "glass"])
def test_rows_do_not_depend_on_batch_or_threads(backend, monkeypatch, path, precision, name):
    monkeypatch.setenv(native.ISA_VARIABLE, path)
    spec, bound, obs, noise, draws = build(name, 75, precision)
    whole = backend.sample(Call(spec, bound, obs, noise, draws)).actions
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 5, 12):
            torch.set_num_threads(count)
            for begin, end in ((0, 1), (31, 33), (5, 8), (70, 74), (3, 10), (60, 75), (0, 75)):
                part = None if draws is None else draws[:, begin:end].contiguous()
                got = backend.sample(Call(spec, bound, obs[begin:end].clone(), noise[begin:end].clone(), part)).actions
                assert torch.equal(got, whole[begin:end])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["u", "u_odd", "u_wide", "qgf_jacobian"])
def test_every_number_of_rows_sums_in_one_order(backend, monkeypatch, path, precision, name):
    """Register blocks and ranges change with the number of rows; the bits of a row must not."""
    monkeypatch.setenv(native.ISA_VARIABLE, path)
    spec, bound, obs, noise, _ = build(name, 64, precision)
    alone = [backend.sample(Call(spec, bound, obs[i : i + 1], noise[i : i + 1], None)).actions for i in range(len(obs))]
    for rows in (*range(2, 42), 64):
        got = backend.sample(Call(spec, bound, obs[:rows], noise[:rows], None)).actions
        assert torch.equal(got, torch.cat(alone[:rows])), rows


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_forward_and_vjp_of_single_networks(backend, precision):
    torch.manual_seed(1)
    tolerance = 1e-5 if precision == "float32" else 5e-2
    nets = (
        networks.FlowMLP(11, 5, (37, 64), "silu", "pre"),
        networks.CriticEnsemble(40, 25, 4, (64, 33)),
        networks.MetaFlowMap(7, 3, (50,), "gelu", None, "fourier"),
    )
    for net in nets:
        bound, spec = net.bound(), net.spec
        for batch in (1, 17, 100):
            blocks = [torch.randn(batch, spec.block_dim(name)) for name in spec.input_order]
            cotangent = torch.randn(spec.num_members, batch, spec.output_dim)
            exact = [block.double() for block in blocks]
            oracle = ReferenceBackend()
            torch.testing.assert_close(
                backend.forward(bound, blocks, precision).double(),
                oracle.forward(bound, exact, "float64"),
                rtol=tolerance,
                atol=tolerance,
            )
            torch.testing.assert_close(
                backend.vjp(bound, blocks, cotangent, precision).double(),
                oracle.vjp(bound, exact, cotangent.double(), "float64"),
                rtol=tolerance,
                atol=tolerance,
            )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("path", PATHS)
def test_activations_over_their_whole_range(backend, monkeypatch, activation, path):
    """One hidden unit of weight 1 shows the activation itself; its vjp, the derivative."""
    monkeypatch.setenv(native.ISA_VARIABLE, path)
    net = networks.CriticEnsemble(1, 1, 1, (1,), activation, None)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.zero_()
            if name.endswith("weight") or "weight" in name:
                parameter.fill_(1.0)
    z = torch.cat(
        [torch.linspace(-100, 100, 4001), torch.linspace(-3, 3, 2001), torch.tensor([1e30, -1e30, 3e38, -3e38])]
    )
    zeros = torch.zeros_like(z).unsqueeze(-1)
    blocks, ones = [zeros, z.unsqueeze(-1)], torch.ones(1, len(z), 1)
    exact = [block.double() for block in blocks]
    value = backend.forward(net.bound(), blocks, "float32")
    slope = backend.vjp(net.bound(), blocks, ones, "float32")
    assert value.isfinite().all() and slope.isfinite().all()
    inner = z.abs() <= 100
    oracle = ReferenceBackend()
    torch.testing.assert_close(
        value[0, inner].double(), oracle.forward(net.bound(), exact, "float64")[0, inner], rtol=2e-6, atol=1e-7
    )
    expected = oracle.vjp(net.bound(), exact, ones.double(), "float64")
    torch.testing.assert_close(slope[inner].double(), expected[inner], rtol=2e-6, atol=5e-7)
    # where there is none, none is left for large weights and a matched norm to make a push of
    assert (slope[(expected.abs() < 1e-37) & (z.unsqueeze(-1).abs() > 44)].abs() < 1e-34).all()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_live_weights_are_seen_however_they_change(backend, precision):
    """The fingerprints must notice everything: one bit, swaps, sign flips, moves between rows."""
    spec, bound, obs, noise, draws = build("u", 5, precision)
    weight = bound.critic.layers[1].weight[0]

    def unchanged() -> torch.Tensor:
        """What a backend without any memory of earlier calls gives."""
        return CpuBackend().sample(Call(spec, bound, obs, noise, draws)).actions

    before = backend.sample(Call(spec, bound, obs, noise, draws)).actions
    packed = backend.pack(spec, bound)
    edits = [
        lambda w: w.neg_(),
        lambda w: w[3:5].copy_(w[3:5].flip(0)),
        lambda w: w[:, 1].mul_(-1),
        lambda w: w.copy_(w.t().clone()),
        lambda w: w[7, 9].add_(0.5),
        lambda w: w.copy_(w.roll(1, 0)),
        lambda w: w[-1, -1].add_(0.25),
    ]
    with torch.no_grad():
        for edit in edits:
            edit(weight)
            assert torch.equal(backend.sample(Call(spec, bound, obs, noise, draws)).actions, unchanged())
            assert torch.equal(backend.sample(Call(spec, bound, obs, noise, draws, packed=packed)).actions, before)
        bound.critic.layers[0].bias[1].add_(0.3)
        bound.flow.layers[-1].weight[0].mul_(1.1)
        assert torch.equal(backend.sample(Call(spec, bound, obs, noise, draws)).actions, unchanged())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_parameter_dtypes_and_strides(backend, dtype):
    spec, bound, obs, noise, draws = build("u", 9)
    layers = []
    for layer in bound.critic.layers:
        weight = tuple(w.t().contiguous().t().to(dtype) for w in layer.weight)  # column-major
        layers.append(replace(layer, weight=weight, bias=tuple(b.to(dtype) for b in layer.bias)))
    other = replace(bound, critic=replace(bound.critic, layers=tuple(layers)))
    got = backend.sample(Call(spec, other, obs, noise, draws)).actions
    assert_close(got, reference(spec, other, obs, noise, draws).actions)


@pytest.mark.parametrize("path", PATHS)
def test_members_tied_for_the_minimum_share_its_gradient(backend, monkeypatch, path):
    monkeypatch.setenv(native.ISA_VARIABLE, path)
    spec, bound, obs, noise, draws = build("u", 9)
    with torch.no_grad():
        for layer in bound.critic.layers:
            for members in (layer.weight, layer.bias):  # the norms' are ones and zeros
                members[1].copy_(members[0])
        bound.critic.layers[-1].bias[2].add_(100)  # the third is never the minimum
    spec = replace(spec, steering=replace(spec.steering, aggregation="min", scale="absolute"))
    got, want = (
        backend.sample(Call(spec, bound, obs, noise, draws, return_info=True)),
        reference(spec, bound, obs, noise, draws),
    )
    assert_close(got.actions, want.actions)
    torch.testing.assert_close(got.report.gradient_norms.double(), want.report.gradient_norms, rtol=1e-3, atol=1e-6)


def test_bad_rows_stay_alone(backend):
    spec, bound, obs, noise, draws = build("u", 40)
    clean = backend.sample(Call(spec, bound, obs, noise, draws)).actions
    obs, noise = obs.clone(), noise.clone()
    noise[7, 2], noise[20, 0], obs[33, 1] = float("nan"), float("inf"), float("nan")
    got = backend.sample(Call(spec, bound, obs, noise, draws)).actions
    good = [i for i in range(40) if i not in (7, 20, 33)]
    assert torch.equal(got[good], clean[good])


def test_rows_without_a_finite_critic_follow_the_flow(backend):
    spec, bound, obs, noise, draws = build("u", 6)
    with torch.no_grad():
        bound.critic.layers[-1].bias[1].fill_(float("nan"))
    raw = backend.sample(Call(spec, bound, obs, noise, draws, return_info=True))
    plain = backend.sample(Call(replace(spec, steering=Steering.unsteered()), bound, obs, noise, None))
    torch.testing.assert_close(raw.actions, plain.actions, rtol=0, atol=1e-6)
    assert raw.report.nonfinite[1:].all() and not raw.report.nonfinite[0].any() and not raw.report.gradient_norms.any()


def test_concurrent_calls(backend):
    spec, bound, obs, noise, draws = build("m", 23)
    want = backend.sample(Call(spec, bound, obs, noise, draws)).actions
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda _: backend.sample(Call(spec, bound, obs, noise, draws)).actions, range(64))
    assert all(torch.equal(result, want) for result in results)


def test_works_after_fork():
    code = """
    import os, torch
    from tests.test_cpu_backend import Call, CpuBackend, build
    args, backend = build("u", 33), CpuBackend()
    torch.set_num_threads(2)
    want = backend.sample(Call(*args)).actions
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(backend.sample(Call(*args)).actions, want) else 1)
    assert os.waitpid(child, 0)[1] == 0
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120, cwd=os.getcwd())


def test_denormal_mode_is_restored(backend):
    tiny = torch.tensor([1e-40])
    backend.sample(Call(*build("u", 3)))
    assert (tiny * 1.0).item() != 0


def test_unknown_path_is_refused(backend, monkeypatch):
    monkeypatch.setenv(native.ISA_VARIABLE, "sse9")
    assert "sse9" in backend.unavailable_reason()


def test_wrong_inputs_raise(backend):
    spec, bound, obs, noise, draws = build("u", 4)
    with pytest.raises(ValueError, match="noise"):
        backend.sample(Call(spec, bound, obs, noise.double(), draws))
    with pytest.raises(ValueError, match="obs"):
        backend.sample(Call(spec, bound, obs[:3], noise, draws))


def test_footprint(backend):
    spec = build("u", 1)[0]
    small, large = backend.footprint(spec, 1), backend.footprint(spec, 256)
    assert small.launches == 1 and small.floor_s > 0
    assert large.flops == 256 * small.flops and large.weight_bytes == small.weight_bytes
    assert 0 < small.workspace_bytes <= large.workspace_bytes < 64 << 20
    unsteered = backend.footprint(build("unsteered", 1)[0], 1)
    assert 0 < unsteered.floor_s and unsteered.traffic_bytes < small.traffic_bytes


def test_loads_of_the_weights_alone():
    def read(flow_bytes, twice, steps):
        return native.load_module().cpu_read_weights(flow_bytes, twice, steps, 2 * steps + 1, 2, 0.02)

    best, median = read(1 << 20, (1 << 20,) * 4, 4)
    assert 0 < best <= median
    assert 0 < read(1000, (), 1)[0]
    with pytest.raises(ValueError, match="bytes"):
        read(0, (), 1)
    with pytest.raises(ValueError, match="steps"):
        read(1000, (), 0)
