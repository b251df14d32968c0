"""Every CUDA kernel, compiled for the CPU and run under the emulator's checks, against the float64 reference.

Seeds choose the order in which threads run; the grid is as many blocks as the emulated GPU has SMs. Sizes are small and
odd: the emulator costs about 10^4 times a GPU, and edges are where indexing goes wrong.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from qpilots_fast import BackendUnavailable, Steering
from qpilots_fast.activations import ACTIVATIONS
from qpilots_fast.backends import Call
from qpilots_fast.backends.cuda import CudaBackend
from qpilots_fast.backends.cuda.counts import count_call_exchanges, count_exchanges
from qpilots_fast.backends.cuda.layout import presence
from qpilots_fast.backends.cuda.library import Library
from qpilots_fast.backends.cuda.plan import Program, plan_network, plan_sample
from qpilots_fast.backends.reference import ReferenceBackend
from qpilots_fast.reference import clean_actions, steer_velocity
from qpilots_fast.spec import BoundNetwork, BoundNetworks, LayerParameters, RawSample, SamplerSpec
from qpilots_fast.testing import PRESETS, Case, assert_close, make_case, random_case, settings_grid
from tests import test_own_columns as own

cuda_emulator = pytest.importorskip("cuda_emulator")
pytestmark = pytest.mark.skipif(cuda_emulator.compiler() is None, reason="g++ is missing")

# What float32 may lose beside the reference in a norm of g, relative to the largest; g sums E members' gradients.
NORM_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}


@pytest.fixture(scope="module")
def library() -> Library:
    return cuda_emulator.emulated_kernels()


@pytest.fixture
def cuda(library) -> CudaBackend:
    library.emulator.configure()
    return CudaBackend(library)


def call(case: Case, precision: str) -> tuple:
    critic = case.critic if case.steering.steers else None
    posterior = case.posterior if case.steering.estimate == "mfm" else None
    spec = SamplerSpec(
        case.flow.spec,
        None if critic is None else critic.spec,
        None if posterior is None else posterior.spec,
        case.steering,
        case.num_steps,
        precision,
        *case.bounds,
        case.time_grid,
    )
    networks = BoundNetworks(
        case.flow.bound(),
        None if critic is None else critic.bound(),
        None if posterior is None else posterior.bound(),
    )
    return spec, networks, case.obs, case.noise, case.posterior_noise


def sample(backend, case: Case, precision: str = "float32", **arguments) -> RawSample:
    return backend.sample(Call(*call(case, precision), return_info=True, **arguments))


def check(cuda: CudaBackend, case: Case, precision: str = "float32", **arguments) -> RawSample:
    """One call against the float64 reference of the same weights and noise."""
    got = sample(cuda, case, precision, **arguments)
    expected = sample(ReferenceBackend(), case.double(), "float64", **arguments)
    assert_close(got.actions, expected.actions, precision)
    scale = expected.report.gradient_norms.max().clamp(min=1e-3)
    assert (got.report.gradient_norms - expected.report.gradient_norms).abs().max() <= NORM_TOLERANCE[precision] * scale
    assert torch.equal(got.report.nonfinite, expected.report.nonfinite)
    if precision == "float32":
        assert torch.equal(got.report.gated, expected.report.gated)
        torch.testing.assert_close(got.report.q_std.double(), expected.report.q_std, atol=1e-4, rtol=1e-3)
    return got


def rows(case: Case, chosen: slice) -> Case:
    eps = None if case.posterior_noise is None else case.posterior_noise[:, chosen].contiguous()
    return dataclasses.replace(case, obs=case.obs[chosen], noise=case.noise[chosen], posterior_noise=eps)


FUSED = [name for name, steering in PRESETS.items() if steering.estimate != "glass"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", FUSED)
def test_presets(cuda, preset, precision):
    check(cuda, make_case(PRESETS[preset], batch_size=3, num_steps=4), precision)


@pytest.mark.parametrize("batch_size", range(1, 17))
def test_batch_sizes(cuda, batch_size):
    steering = (Steering.qpilots_u(), Steering.qpilots_m(num_samples=3), Steering.qgf(0.1))[batch_size % 3]
    check(cuda, make_case(steering, batch_size=batch_size, num_steps=3), ("float32", "bfloat16")[batch_size % 2])


@pytest.mark.parametrize("norms", [(None, "post"), ("pre", "pre"), ("post", None), ((None, "pre"), ("post", None))])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_norms(cuda, activation, norms):
    case = make_case(
        Steering.qpilots_m(num_samples=2), batch_size=2, num_steps=3, activation=activation, layer_norm=norms[0],
        critic_layer_norm=norms[1], hidden_dims=(19, 12),
    )  # fmt: skip
    check(cuda, case)


@pytest.mark.parametrize("shift", [0.0, 4.0])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("steering", [Steering.qpilots_u(), Steering.qpilots_m(num_samples=2)])
def test_folded_norms(cuda, steering, precision, shift):
    """With gains and shifts of all sizes, and rows whose mean is several times their std."""
    case = make_case(
        steering, batch_size=3, num_steps=3, hidden_dims=(37, 64, 70), layer_norm="post", critic_layer_norm="post"
    )
    assert sum(p.folded for p in planned(case).phases) == 2 * 2  # two of the critics' layers, there and back
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for network in (case.flow, case.critic, case.posterior):
            for layer in network.bound().layers[:-1]:
                for gain, beta, bias in zip(layer.norm_weight, layer.norm_bias, layer.bias):
                    gain.copy_(1 + 0.3 * torch.randn(gain.shape, generator=generator))
                    beta.copy_(0.3 * torch.randn(beta.shape, generator=generator))
                    bias.add_(shift * (network is case.critic))
    if precision == "float32":
        check(cuda, case)
        return
    expected = sample(ReferenceBackend(), case.double(), "float64").actions
    ours = (sample(cuda, case, precision).actions - expected).abs().mean()
    torchs = (sample(ReferenceBackend(), case, precision).actions - expected).abs().mean()
    assert ours <= 1.5 * torchs


@pytest.mark.parametrize("hidden", [(1,), (16,), (64, 48), (37, 24, 129), (200, 7, 65, 33), (300,)])
@pytest.mark.parametrize("num_critics", [1, 7])
def test_widths_and_members(cuda, hidden, num_critics):
    check(cuda, make_case(batch_size=2, num_steps=2, hidden_dims=hidden, num_critics=num_critics))


@pytest.mark.parametrize("action_dim", [1, 8, 33, 70])
def test_action_widths(cuda, action_dim):
    check(cuda, make_case(batch_size=2, num_steps=3, action_dim=action_dim, obs_dim=3))


@pytest.mark.parametrize("time_embedding", ["raw", "sinusoidal", "fourier"])
@pytest.mark.parametrize("preset", ["qpilots_m", "qpilots_u"])
def test_time_embeddings(cuda, preset, time_embedding):
    check(cuda, make_case(PRESETS[preset], batch_size=2, num_steps=4, time_embedding=time_embedding))


SETTINGS = settings_grid("noisy", "tweedie", "mfm") | {
    "steered_dims": Steering(steered_dims=(0, 3)),
    "q_scale": Steering(estimate="mfm", num_samples=3, q_scale=2.5),
    "batch_std": Steering(estimate="mfm", num_samples=3, q_scale="batch_std"),
    "batch_std_one_estimate": Steering(scale="absolute", q_scale="batch_std"),
    "first_step": Steering(steer_first_step=True),
    "step_weights": Steering(step_weights=(0.5, 0.0, 1.5)),
    "window_m": Steering(estimate="mfm", num_samples=2, window=(0.3, 0.5)),
    "one_draw": Steering(estimate="mfm", num_samples=1),
    "identity_masked": Steering(jacobian="identity", clip="masked", scale="absolute"),
}


@pytest.mark.parametrize("steering", [Steering.qpilots_u(), Steering.qpilots_m(num_samples=2), Steering.gaf(0.5)])
def test_gate_and_strength_of_each_row(cuda, steering):
    case = make_case(steering, batch_size=5, num_steps=3)
    std = sample(ReferenceBackend(), case.double(), "float64").report.q_std
    gate = float(std[std > 0].median()) * 1.001
    case = dataclasses.replace(case, steering=dataclasses.replace(steering, max_disagreement=gate))
    report = check(cuda, case, alpha=torch.tensor([0.0, 0.1, 0.5, 2.0, 1.0])).report
    assert report.gated.any() and not report.gated[1:].all()


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(cuda, name):
    check(cuda, make_case(SETTINGS[name], batch_size=2, num_steps=3, hidden_dims=(21, 13)))


@pytest.mark.parametrize("steering", [Steering(clip="masked", scale="absolute"), Steering.qpilots_m(num_samples=2)])
def test_bounds_of_each_dimension_and_a_free_time_grid(cuda, steering):
    bounds = (-0.3, -math.inf, 0.1), (0.2, 0.4, math.inf)
    case = make_case(steering, batch_size=3, num_steps=3, action_dim=3)
    check(cuda, dataclasses.replace(case, bounds=bounds, time_grid=(0.0, 0.15, 0.6, 1.0)))


def test_more_draws_than_lanes(cuda):
    check(cuda, make_case(Steering(estimate="mfm", num_samples=35), batch_size=1, num_steps=2, hidden_dims=(9,)))


@pytest.mark.parametrize("seed", range(16))
def test_random_cases(cuda, library, seed):
    case = random_case(seed, batch_size=1 + seed % 16)
    if case.steering.estimate == "glass":
        case = case.with_steering(Steering.qpilots_u())
    case = dataclasses.replace(case, num_steps=min(case.num_steps, 4)).with_steering(case.steering)
    library.emulator.configure(seed=seed, num_sms=1 + seed % 6, preempt_every=(0, 64, 1024)[seed % 3])
    check(cuda, case)


@pytest.mark.parametrize("preset", ["qpilots_u", "qpilots_m", "qgf"])
def test_same_bits_for_every_batch_grid_and_schedule(cuda, library, preset):
    case = make_case(PRESETS[preset], batch_size=16, num_steps=3, critic_layer_norm="pre", hidden_dims=(37, 24))
    library.emulator.configure(seed=1, num_sms=3)
    together = sample(cuda, case)
    for batch, first, seed, num_sms in ((1, 5, 2, 1), (4, 8, 3, 7), (5, 11, 4, 2)):
        library.emulator.configure(seed=seed, num_sms=num_sms)
        chosen = slice(first, first + batch)
        alone = sample(cuda, rows(case, chosen))
        assert torch.equal(alone.actions, together.actions[chosen])
        assert torch.equal(alone.report.gradient_norms, together.report.gradient_norms[:, chosen])


def test_same_bits_with_little_shared_memory(cuda, library):
    case = make_case(batch_size=7, num_steps=3, hidden_dims=(150, 40))
    plenty = sample(cuda, case)
    library.emulator.configure(max_shared_bytes=29_000)
    assert torch.equal(sample(cuda, case).actions, plenty.actions)
    library.emulator.configure(max_shared_bytes=9_000)
    with pytest.raises(BackendUnavailable, match=r"need \d+ bytes of shared memory; this GPU gives a block 9000"):
        sample(cuda, case)


def test_no_call_takes_shared_memory_from_a_launch_of_another_thread(cuda, library):
    """The attribute belongs to the kernel, and another thread may launch the same one with more at any moment."""
    for hidden in ((150, 40), (9,)):
        sample(cuda, make_case(batch_size=7, num_steps=2, hidden_dims=hidden))
        assert library.emulator.allowed_shared_bytes() == 232448


def test_row_with_a_nonfinite_gradient_follows_the_plain_flow(cuda):
    for steering in (Steering.qpilots_u(), Steering.qpilots_m(num_samples=2), Steering.gaf(), Steering.qgf(0.1)):
        case = make_case(steering, batch_size=3, num_steps=3, critic_layer_norm=None)
        case.obs[:, 2] = torch.tensor([0.0, 10.0, 0.0])
        with torch.no_grad():  # the critics of row 1 overflow; the flow does not see it
            for weight in case.critic.bound().layers[0].weight:
                weight[:, 2] = 3e38
        plain = sample(cuda, case.with_steering(Steering.unsteered()))
        got, expected = sample(cuda, case), sample(ReferenceBackend(), case, "float32")
        assert torch.equal(got.report.nonfinite, expected.report.nonfinite) and got.report.nonfinite[-1].tolist() == [
            False,
            True,
            False,
        ]
        assert torch.equal(got.actions[1], plain.actions[1])
        assert_close(got.actions, expected.actions)


def test_live_weights_are_read_at_each_call_and_packed_ones_are_not(cuda):
    case = make_case(batch_size=2, num_steps=2)
    spec, networks, *inputs = call(case, "float32")
    packed = cuda.pack(spec, networks)
    before = cuda.sample(Call(spec, networks, *inputs)).actions
    with torch.no_grad():
        for parameter in case.flow.parameters():
            parameter.mul_(1.1)
    assert torch.equal(cuda.sample(Call(spec, networks, *inputs, packed=packed)).actions, before)
    check(cuda, case)
    with pytest.raises(ValueError, match="another sampler"):
        other = make_case(Steering.qgf(0.1), batch_size=2)
        cuda.sample(Call(*call(other, "float32"), packed=packed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_parameters_of_any_type_and_stride(cuda, dtype):
    case = make_case(batch_size=2, num_steps=2)

    def convert(network: BoundNetwork) -> BoundNetwork:
        def weight(w: Tensor) -> Tensor:  # neither row- nor column-major
            wide = torch.zeros(w.shape[1], 2 * w.shape[0] + 1, dtype=dtype)
            view = wide[:, 1::2].t()
            view.copy_(w)
            return view

        layers = tuple(
            LayerParameters(
                tuple(weight(w) for w in layer.weight),
                *(p and tuple(v.to(dtype) for v in p) for p in (layer.bias, layer.norm_weight, layer.norm_bias)),
            )
            for layer in network.layers
        )
        return BoundNetwork(network.spec, layers)

    spec, networks, *inputs = call(case, "float32")
    networks = BoundNetworks(convert(networks.flow), convert(networks.critic))
    expected = ReferenceBackend().sample(Call(spec, networks, *inputs)).actions
    assert_close(cuda.sample(Call(spec, networks, *inputs)).actions, expected)


def test_input_blocks_in_any_order(cuda):
    case = make_case(Steering.qpilots_m(num_samples=2), batch_size=2, num_steps=3, time_embedding="fourier")
    orders = {
        "flow": ("t", "noisy_actions", "obs"),
        "critic": ("actions", "obs"),
        "meta_flow_map": ("noisy_actions", "u", "obs", "xbar", "s", "t"),
    }

    def permute(network: BoundNetwork) -> BoundNetwork:
        spec, first = network.spec, network.layers[0]
        order = orders[spec.kind]
        weight = tuple(torch.cat([w[:, spec.block_slices[block]] for block in order], dim=1) for w in first.weight)
        layers = (dataclasses.replace(first, weight=weight), *network.layers[1:])
        return BoundNetwork(dataclasses.replace(spec, input_order=order), layers)

    spec, networks, *inputs = call(case, "float32")
    expected = cuda.sample(Call(spec, networks, *inputs)).actions
    networks = BoundNetworks(*(permute(n) for n in (networks.flow, networks.critic, networks.posterior)))
    spec = dataclasses.replace(
        spec, flow=networks.flow.spec, critic=networks.critic.spec, posterior=networks.posterior.spec
    )
    assert_close(cuda.sample(Call(spec, networks, *inputs)).actions, expected, scale=0.01)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch_size", [0, 1, 33])
@pytest.mark.parametrize("kind", ["flow", "critic", "posterior"])
def test_networks_forward_and_vjp(cuda, kind, batch_size, precision):
    case = make_case(layer_norm="pre", hidden_dims=(37, 24), num_critics=3)
    network, double = getattr(case, kind).bound(), getattr(case.double(), kind).bound()
    spec = network.spec
    blocks = [torch.randn(batch_size, spec.block_dim(block)) for block in spec.input_order]
    cotangent = torch.randn(spec.num_members, batch_size, spec.output_dim)
    reference, wide = ReferenceBackend(), [block.double() for block in blocks]
    expected = reference.forward(double, wide, "float64")
    expected_vjp = reference.vjp(double, wide, cotangent.double(), "float64")
    scale = {"float32": 0.1, "bfloat16": 4.0}[precision]  # outputs are not bounded to [-1, 1]
    if batch_size == 0:
        assert cuda.forward(network, blocks, precision).shape == expected.shape
        assert cuda.vjp(network, blocks, cotangent, precision).shape == expected_vjp.shape
        return
    assert_close(cuda.forward(network, blocks, precision), expected, precision, scale)
    prepared = cuda.prepare(network, precision)
    assert torch.equal(cuda.forward(prepared, blocks, precision), cuda.forward(network, blocks, precision))
    assert_close(cuda.vjp(network, blocks, cotangent, precision), expected_vjp, precision, scale)


ROW_SETTINGS = {
    "norm_match": Steering(alpha=0.3),
    "absolute": Steering(alpha=0.3, scale="absolute"),
    "gaf": Steering(alpha=0.3, scale="gaf", max_grad_norm=0.7, gaf_beta=2.0),
    "steered_dims": Steering(alpha=0.3, steered_dims=(1, 4)),
}


@pytest.mark.parametrize("batch_size", [0, 1, 9, 257])
@pytest.mark.parametrize("name", ROW_SETTINGS)
def test_steer_step_rows(cuda, name, batch_size):
    steering = ROW_SETTINGS[name]
    x, v, g = (torch.randn(batch_size, 6) for _ in range(3))
    q_std = torch.rand(batch_size)
    if batch_size > 3:
        g[0], g[1], g[2, 4], v[3] = 0, 1e-30, torch.inf, 1e30
        g[3] = 1e30
    got, norms, nonfinite = cuda._rows.steer_step(x, v, g, 0.1, steering, q_std)
    steered, expected = steer_velocity(v.double(), g.double(), steering, q_std.double())
    torch.testing.assert_close(got.double(), x.double() + 0.1 * steered, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norms.double(), expected.gradient_norms, rtol=1e-5, atol=0)
    assert torch.equal(nonfinite, expected.nonfinite)


def test_clean_actions_rows(cuda):
    x, v = torch.randn(9, 6), torch.randn(9, 6)
    for t in (
        torch.full((1, 1), 0.3),
        torch.rand(9, 1),
        torch.rand(9, 6),
        torch.rand(6, 9).t(),
        torch.rand(9, 12)[:, ::2],
    ):
        torch.testing.assert_close(cuda._rows.clean_actions(x, v, t), clean_actions(x, v, t))
    assert cuda._rows.clean_actions(x[:0], v[:0], torch.rand(1, 1)).shape == (0, 6)


def test_tags_go_on_from_call_to_call_and_wrap(cuda, library):
    library.emulator.configure(num_sms=5)
    case = make_case(batch_size=2, num_steps=4)
    first = sample(cuda, case).actions
    (exchange,) = cuda._launcher._exchanges.values()
    assert set(exchange.tags[1:].tolist()) == {4}
    exchange.tags[1:] = 2**32 - 6
    for _ in range(3):
        assert torch.equal(sample(cuda, case).actions, first)
    assert set(exchange.tags[1:].tolist()) == {6}
    exchange.words.random_(0, 2**31)  # tags 0, of no step soon
    assert torch.equal(sample(cuda, case).actions, first)


def test_lost_block_ends_in_nan_and_an_error_at_the_next_call(library):
    library.emulator.configure(num_sms=4)
    impatient = CudaBackend(library, spin_limit=1)
    case = make_case(batch_size=1, num_steps=2)
    assert sample(impatient, case).actions.isnan().all()
    with pytest.raises(RuntimeError, match="gave up waiting"):
        sample(impatient, case)


def test_refusals_say_why(cuda, library):
    device = torch.device("cpu")
    spec = call(make_case(Steering(estimate="glass", num_samples=2)), "float32")[0]
    assert "glass" in cuda.refusal(spec, device)
    spec = call(make_case(), "float16")[0]
    assert "float32, bfloat16, not float16" in cuda.refusal(spec, device)
    own_flow = own.from_module(own.Flow(own.SinusoidalMLP()), "flow", **own.DIMS).bound()
    critic = own.from_module(own.Everything(), "critic", **own.DIMS).bound()
    spec = SamplerSpec(own_flow.spec, critic.spec, None, Steering.qpilots_u(), 2)
    assert "columns" in cuda.refusal(spec, device) and "does not read yet" in cuda.refusal(spec, device)
    with pytest.raises(BackendUnavailable, match="batches up to 16"):
        sample(cuda, make_case(batch_size=17))
    library.emulator.configure(blocks_per_sm=0)
    with pytest.raises(BackendUnavailable, match="no block of the persistent kernel fits"):
        sample(cuda, make_case(batch_size=1))
    library.emulator.configure(has_device=False)
    assert "no CUDA-capable device is detected" in cuda.unavailable_reason()


def test_absent_library_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr("qpilots_fast.backends.cuda.library.library_paths", lambda: (tmp_path / "absent.so",))
    backend = CudaBackend()
    assert "not built" in backend.unavailable_reason()
    (tmp_path / "absent.so").write_text("not a library")
    assert "do not load" in CudaBackend().unavailable_reason()


@pytest.mark.parametrize("num_steps", [1, 3, 10, 40])
@pytest.mark.parametrize(
    "steering, rows", [(Steering.unsteered(), 1), (Steering.qpilots_u(), 1), (Steering.qpilots_m(num_samples=3), 3)]
)
def test_the_number_of_steps_does_not_choose_the_kernel(steering, rows, num_steps):
    """Time features are K rows, but of one product a call; the steps' rows are what a tile is for."""
    for batch_size in (1, 2, 16):
        program = planned(make_case(steering, batch_size=batch_size, num_steps=num_steps))
        assert program.max_rows == batch_size * (rows if program.num_steered else 1)


def planned(case: Case, blocks: int = 132) -> Program:
    spec, networks, *_ = call(case, "float32")
    present = tuple(presence(network) for network in spec.taking_part(networks))
    return plan_sample(spec, present, len(case.obs), 4, blocks)


def test_one_network_runs_the_kernel_of_its_rows():
    network = make_case(batch_size=1).flow.bound()
    assert plan_network(network.spec, presence(network), 33, 4, 132, differentiable=True).max_rows == 33


@pytest.mark.parametrize("blocks", [1, 3, 16, 132])
@pytest.mark.parametrize("steering", [Steering.qpilots_u(), Steering.qpilots_m(num_samples=2)])
def test_every_block_takes_whole_members_and_sends_something_at_each_step(steering, blocks):
    program = planned(make_case(steering, batch_size=1, num_critics=10, hidden_dims=(70, 512, 40)), blocks)
    args, products = program.args, [p for p in program.phases if p.weight >= 0]
    flow = program.phases[args.num_once : args.num_once + args.num_flow_phases]
    flow_products = [p for p in flow if p.weight >= 0 and not p.steered_only]
    assert args.num_blocks <= blocks and all(p.first_block + p.teams * p.team_blocks <= blocks for p in products)
    for steered in (False, True):
        at_work: set[int] = set()
        for p in products[args.num_once :] if steered else flow_products:
            for team in range(p.teams):
                first = p.first_block + team * p.team_blocks
                at_work |= set(range(first, first + min(p.team_blocks, p.tiles)))
        assert at_work == set(range(args.num_blocks if steered else args.num_flow_blocks))


def test_exchanges_a_step():
    """Of a chain from x to x, with L hidden layers; the critics' last norm costs one, outputs of many rows one each."""
    depth = 4
    case = make_case(hidden_dims=(8,) * depth, num_steps=10, batch_size=1, layer_norm=None, critic_layer_norm=None)
    for steering, exchanges, outputs in (
        (Steering.qpilots_u(), 4 * depth, 2),
        (Steering.qpilots_u(jacobian="identity"), 3 * depth, 1),
        (Steering.qpilots_m(), 4 * depth, 2),
    ):
        program = planned(case.with_steering(steering))
        assert count_exchanges(program, steered=True) == exchanges
        assert count_exchanges(program, steered=False) == depth
        assert count_call_exchanges(program) == depth + 1 + 9 * exchanges  # x once, to the critics' blocks
        many = dataclasses.replace(case, obs=torch.zeros(16, 7)).with_steering(steering)
        assert count_exchanges(planned(many), steered=True) == exchanges + outputs
    for norm, more in (("post", 1), ("pre", 2 * depth)):
        normed = make_case(hidden_dims=(8,) * depth, num_steps=10, batch_size=1, critic_layer_norm=norm)
        program = planned(normed.with_steering(Steering.qpilots_u(jacobian="identity")))
        assert count_exchanges(program, steered=True) == 3 * depth + more
