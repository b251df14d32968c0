"""Every Triton kernel in the interpreter against the float64 reference.

Runs where TRITON_INTERPRET=1 (test_triton_interpreter.py starts such a process). Shapes are tiny: the interpreter
spends a millisecond on what a GPU does in nanoseconds. Fresh workspaces are filled with NaN, so anything read before
it is written shows. The interpreter counts as 2 multiprocessors: more than 2 tiles make the programs persistent.

The grid of cases: each setting of Steering once, around QPILOTS-U and -M (settings act in separate lines of the
combination); each activation once, with the norm placements in turn (both act row by row, per layer); sizes on both
sides of every padding.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: test_triton_interpreter.py starts it", allow_module_level=True)

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qpilots_fast.backends import Call
from qpilots_fast.backends.reference import ReferenceBackend
from qpilots_fast.backends.triton import LaunchRow, LaunchTable, Tile, TritonBackend, launcher, launches
from qpilots_fast.backends.triton.counts import num_launches, pack_launches
from qpilots_fast.spec import BoundNetworks, SamplerSpec
from qpilots_fast.steering import Steering
from qpilots_fast.testing import Case, assert_close, make_case
from tests import triton_interpreter

triton_interpreter.install()

REFERENCE = ReferenceBackend()
# float32 errors here are a few 1e-7; 2e-5 still catches a wrong constant or a missing term
FLOAT32_ERROR = 2e-5


def table(tile: Tile) -> LaunchTable:
    precisions = ("float32", "tf32", "bfloat16", "float16")
    return LaunchTable(tuple(LaunchRow(kernel, precisions, (0, 0), tile, "test") for kernel in ("layer", "ends")))


ONE_TILE = table(Tile(16, 64, 64, 1, 1))  # a layer of up to 64 columns in one product: the fastest here
MANY_TILES = table(Tile(16, 16, 16, 1, 1))  # several column tiles and depth steps a layer
LARGE_TILES = table(Tile(16, 16, 16, 1, 1, larger=((20, 2, 4),)))  # from 20 rows on, 32 by 64


def backend(rows: LaunchTable = ONE_TILE, chunk: int | None = None) -> TritonBackend:
    return TritonBackend(rows, fill=float("nan"), chunk=chunk)


U, M = Steering.qpilots_u(), Steering.qpilots_m(num_samples=2)
GLASS = Steering(estimate="glass", num_samples=2, glass_steps=2)


def small(steering: Steering = U, **settings: object) -> Case:
    """Two steps (one steered after the unsteered first), two critics, 3 rows."""
    defaults: dict[str, object] = dict(
        batch_size=3, obs_dim=5, action_dim=3, num_critics=2, hidden_dims=(24, 17), num_steps=2
    )
    return make_case(steering, **{**defaults, **settings})  # type: ignore[arg-type]


def spec_of(case: Case, precision: str = "float32") -> SamplerSpec:
    steering = case.steering
    posterior = case.posterior.spec if steering.steers and steering.estimate == "mfm" else None
    critic = case.critic.spec if steering.steers else None
    return SamplerSpec(
        case.flow.spec, critic, posterior, steering, case.num_steps, precision, *case.bounds, case.time_grid
    )


def networks_of(case: Case) -> BoundNetworks:
    return BoundNetworks(case.flow.bound(), case.critic.bound(), case.posterior.bound())


def check(
    case: Case,
    rows: LaunchTable = ONE_TILE,
    precision: str = "float32",
    alpha: Tensor | None = None,
    chunk: int | None = None,
) -> None:
    spec, networks = spec_of(case, precision), networks_of(case)
    got = backend(rows, chunk).sample(
        Call(spec, networks, case.obs, case.noise, case.posterior_noise, alpha, return_info=True)
    )
    exact = case.double()
    want = REFERENCE.sample(
        Call(
            spec_of(exact, "float64"),
            networks_of(exact),
            exact.obs,
            exact.noise,
            exact.posterior_noise,
            None if alpha is None else alpha.double(),
            return_info=True,
        )
    )
    assert got.report is not None and want.report is not None
    assert torch.equal(got.report.nonfinite, want.report.nonfinite)
    assert torch.equal(got.report.gated, want.report.gated)
    if precision == "float32":
        torch.testing.assert_close(got.actions.double(), want.actions, atol=FLOAT32_ERROR, rtol=0)
        torch.testing.assert_close(got.report.q_std.double(), want.report.q_std, atol=FLOAT32_ERROR, rtol=1e-4)
        torch.testing.assert_close(
            got.report.gradient_norms.double(), want.report.gradient_norms, atol=FLOAT32_ERROR, rtol=1e-4
        )
    else:
        assert_close(got.actions, want.actions, precision)


STEERINGS = {
    "unsteered": Steering.unsteered(),
    "u": U,
    "u_identity": replace(U, jacobian="identity"),
    "u_every_step": replace(U, steer_first_step=True),
    "u_rho": replace(U, rho=2.0, alpha=1.5, eps=0.1),
    "u_tau_q_scale": replace(U, tau=3.0, q_scale=0.5, scale="absolute"),
    "u_mean": replace(U, aggregation="mean"),
    "u_min": replace(U, aggregation="min"),
    "u_masked": replace(U, clip="masked"),
    "u_no_clip": replace(U, clip="none"),
    "u_dims": replace(U, steered_dims=(0, 2)),
    "noisy": Steering.noisy(0.2),
    "noisy_masked": replace(Steering.noisy(0.2), clip="masked", jacobian="full"),
    "qgf": Steering.qgf(0.3),
    "qgf_jacobian": Steering.qgf(0.3, jacobian="full"),
    "gaf": replace(Steering.gaf(0.5), max_grad_norm=0.01, gaf_decay=5.0),
    "m": M,
    "m_one_draw": Steering.qpilots_m(num_samples=1),
    "m_three_draws": replace(Steering.qpilots_m(num_samples=3, tau=2.0), q_scale=0.7, clip="masked"),
    "m_gaf_dims": replace(M, scale="gaf", gaf_decay=3.0, aggregation="min", steered_dims=(1,)),
    "m_every_step": replace(M, steer_first_step=True, scale="absolute", alpha=0.4),
    "glass": GLASS,
    "glass_one_step": replace(GLASS, glass_steps=1, steer_first_step=True),
    "glass_gaf": replace(GLASS, num_samples=1, glass_steps=3, scale="gaf", clip="none"),
}


@pytest.mark.parametrize("name", STEERINGS)
def test_every_setting_of_steering(name: str) -> None:
    check(small(STEERINGS[name]))


@pytest.mark.parametrize(
    "activation, layer_norm, critic_layer_norm, time_embedding",
    [
        ("gelu_tanh", ("pre", None), "pre", "sinusoidal"),
        ("gelu", "post", None, "fourier"),
        ("relu", "pre", ("post", "pre"), "raw"),
        ("silu", (None, "post"), (None, "post"), "raw"),
        ("mish", ("post", "pre"), "pre", "fourier"),
        ("tanh", None, ("pre", None), "sinusoidal"),
        ("elu", "post", "post", "raw"),
        ("selu", None, "post", "raw"),
        ("softplus", "pre", None, "raw"),
        ("sigmoid", None, "pre", "raw"),
        ("symexp", "pre", "pre", "raw"),
    ],
)
def test_every_activation_placement_and_embedding(
    activation: str, layer_norm: object, critic_layer_norm: object, time_embedding: str
) -> None:
    settings = dict(
        activation=activation, layer_norm=layer_norm, critic_layer_norm=critic_layer_norm, time_embedding=time_embedding
    )
    check(small(U, **settings), MANY_TILES)
    check(small(M, batch_size=2, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        dict(batch_size=1, obs_dim=1, action_dim=1, hidden_dims=(1,), num_critics=1),
        dict(batch_size=2, obs_dim=70, action_dim=17, hidden_dims=(33,), num_critics=3),
        dict(batch_size=2, obs_dim=3, action_dim=16, hidden_dims=(16, 64, 5), num_critics=1),
        dict(batch_size=17, obs_dim=16, action_dim=2, hidden_dims=(8,)),
    ],
    ids=["ones", "wide_inputs", "uneven_depths", "two_row_blocks"],
)
@pytest.mark.parametrize("steering", [U, M, GLASS], ids=["u", "m", "glass"])
def test_odd_sizes(steering: Steering, settings: dict[str, object]) -> None:
    check(small(steering, **settings), MANY_TILES if settings["batch_size"] == 2 else ONE_TILE)


def median_std(case: Case) -> float:
    """A gate that some rows pass and others do not."""
    exact = case.double()
    call = Call(spec_of(exact, "float64"), networks_of(exact), exact.obs, exact.noise, exact.posterior_noise)
    report = REFERENCE.sample(replace(call, return_info=True)).report
    assert report is not None
    return float(report.q_std[report.q_std > 0].median()) * 1.001


@pytest.mark.parametrize("steering", [U, M, replace(U, scale="gaf", gaf_beta=2.0)], ids=["u", "m", "gaf"])
def test_gate_and_strength_of_each_row(steering: Steering) -> None:
    case = small(steering, batch_size=5, num_steps=3)
    gated = replace(case, steering=replace(steering, max_disagreement=median_std(case)))
    check(gated)
    check(gated, alpha=torch.tensor([0.0, 0.1, 0.5, 2.0, 1.0]))


@pytest.mark.parametrize("weights", [(0.0, 0.5, 0.0, 0.0, 2.0, 0.0), (1.0, 0.0, 0.0, 0.0, 0.0, 1.0)])
@pytest.mark.parametrize("steering", [U, M], ids=["u", "m"])
def test_unsteered_steps_between_steered_ones(steering: Steering, weights: tuple[float, ...]) -> None:
    case = small(replace(steering, step_weights=weights), num_steps=6)
    check(case)
    plan = backend().plan(spec_of(case), torch.device("cpu"))
    assert num_launches(plan, 3)["combine"] == 2  # the critics are asked where the weight is not 0


@pytest.mark.parametrize("steering", [replace(U, clip="masked"), M, GLASS], ids=["u", "m", "glass"])
def test_bounds_of_each_dimension_and_a_free_time_grid(steering: Steering) -> None:
    bounds = (-0.3, -math.inf, 0.1), (0.2, 0.4, math.inf)
    check(replace(small(steering, num_steps=3), bounds=bounds, time_grid=(0.0, 0.15, 0.6, 1.0)))


@pytest.mark.parametrize("steering", [U, M, GLASS], ids=["u", "m", "glass"])
def test_rows_in_chunks(steering: Steering) -> None:
    """Two whole chunks of two row blocks, and a last one of a few rows."""
    case = small(steering, batch_size=37, hidden_dims=(9,), num_critics=1, num_steps=3)
    check(case, alpha=torch.rand(37), chunk=17)


@pytest.mark.parametrize("norm", ["post", "pre", ("post", "pre")])
def test_larger_programs_for_many_rows(norm: object) -> None:
    case = small(U, batch_size=21, hidden_dims=(70, 33), layer_norm=norm, critic_layer_norm=norm)
    check(case, LARGE_TILES)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_norms_of_values_far_from_zero(precision: str) -> None:
    """What a norm divides by is small beside what it subtracts, in critics, whose norms are folded, and in a flow."""
    case = small(replace(U, scale="absolute"), hidden_dims=(64, 64), layer_norm="post", batch_size=4)
    with torch.no_grad():
        for network in (case.flow, case.critic):
            for layer in network.bound().layers[:-1]:
                for bias in layer.bias or ():
                    bias += 3.0
    check(case, precision=precision)


def test_more_draws_than_a_tile_has_rows() -> None:
    check(small(Steering.qpilots_m(num_samples=19), batch_size=2, hidden_dims=(9,), num_critics=1))


@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("steering", [U, M, Steering.qgf(0.1)], ids=["u", "m", "qgf"])
def test_reduced_precisions(precision: str, steering: Steering) -> None:
    check(small(steering, hidden_dims=(24,), num_steps=4), precision=precision)


def test_bfloat16_follows_the_reference_that_rounds_the_same_operands() -> None:
    """Rounding the same operands leaves only the order of float32 sums and the cotangents' scaling."""
    case = small(replace(U, alpha=0.5), batch_size=5)
    args = (networks_of(case), case.obs, case.noise, None)
    got = backend().sample(Call(spec_of(case, "bfloat16"), *args)).actions
    want = REFERENCE.sample(Call(spec_of(case, "bfloat16"), *args)).actions
    assert (got - want).abs().max() < 2e-3


@pytest.mark.parametrize("steering", [U, M], ids=["u", "m"])
def test_a_row_without_a_finite_gradient_follows_the_flow(steering: Steering) -> None:
    case = small(steering, hidden_dims=(24,))
    with torch.no_grad():  # the critics alone see the observation
        obs_columns = case.flow.spec.block_slices["obs"]
        for network in (case.flow, case.posterior):
            network.bound().layers[0].weight[0][:, obs_columns] = 0.0
    case.obs[1] = 3e38
    spec, nets = spec_of(case), networks_of(case)
    got = backend().sample(Call(spec, nets, case.obs, case.noise, case.posterior_noise, return_info=True))
    unsteered = replace(spec, steering=Steering.unsteered(), critic=None, posterior=None)
    plain = backend().sample(Call(unsteered, nets, case.obs, case.noise, None))
    assert got.report.nonfinite is not None and got.report.gradient_norms is not None
    assert got.report.nonfinite.tolist() == [[False] * 3, [False, True, False]]
    assert got.report.gradient_norms[1, 1] == 0 and got.report.gradient_norms[1, 0] > 0
    assert torch.equal(got.actions[1], plain.actions[1])
    assert not torch.equal(got.actions[0], plain.actions[0])


@pytest.mark.parametrize("steering", [U, M], ids=["u", "m"])
def test_a_row_does_not_depend_on_its_batch(steering: Steering, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_dot", triton_interpreter.product_in_fixed_order)
    case = small(steering, batch_size=37, hidden_dims=(9, 70), num_critics=1, num_steps=2)
    nets, spec = networks_of(case), spec_of(case)

    def run(rows: slice) -> Tensor:
        eps = None if case.posterior_noise is None else case.posterior_noise[:, rows].contiguous()
        return backend(LARGE_TILES).sample(Call(spec, nets, case.obs[rows], case.noise[rows], eps)).actions

    whole = run(slice(None))
    for rows in (slice(0, 1), slice(20, 37), slice(30, 33)):
        assert torch.equal(run(rows), whole[rows])


class Allocations(TorchDispatchMode):
    """Shapes that tensor factories make outside the kernels (the interpreter copies its arguments)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.shapes: list[list[int]] = []
        self.inside_kernel = False
        kernel_of = launcher.kernel_of

        def paused(name: str) -> dict[object, object]:
            class Grids(dict):  # type: ignore[type-arg]
                def __missing__(_, grid: object) -> object:
                    def run(**arguments: object) -> None:
                        self.inside_kernel = True
                        kernel_of(name)[grid](**arguments)
                        self.inside_kernel = False

                    return run

            return Grids()

        monkeypatch.setattr(launcher, "kernel_of", paused)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if not self.inside_kernel and isinstance(out, Tensor) and func._schema.name.split("::")[1] in (
            "empty", "empty_like", "new_empty", "zeros", "clone", "_to_copy", "full", "empty_strided", "zeros_like",
        ):  # fmt: skip
            self.shapes.append(list(out.shape))
        return out


@pytest.mark.parametrize("steering", [U, M, GLASS, Steering.qgf(0.1)], ids=["u", "m", "glass", "qgf"])
def test_launches_and_allocations_of_a_call(steering: Steering, monkeypatch: pytest.MonkeyPatch) -> None:
    """As counted, weights packed anew included; the second call allocates the result alone."""
    case = small(steering, hidden_dims=(9,), num_critics=1, num_steps=3, batch_size=2)
    triton, spec, nets = backend(), spec_of(case), networks_of(case)
    args = (spec, nets, case.obs, case.noise, case.posterior_noise)
    first = triton.sample(Call(*args)).actions
    spaces = triton._workspaces.values()
    launches.reset()
    with Allocations(monkeypatch) as made:
        second = triton.sample(Call(*args)).actions
    plan = triton.plan(spec, torch.device("cpu"))
    assert launches.by_name == num_launches(plan, 2) + pack_launches(plan)
    assert launches.total == triton.footprint(spec, 2).launches
    assert made.shapes == [list(case.noise.shape)]
    assert [id(w) for w in triton._workspaces.values()] == [id(w) for w in spaces]
    assert torch.equal(first, second)


def test_live_weights_are_read_at_every_call_and_frozen_ones_are_not() -> None:
    case = small(U, hidden_dims=(9,))
    triton, spec, nets = backend(), spec_of(case), networks_of(case)
    packed = triton.pack(spec, nets)
    before = triton.sample(Call(spec, nets, case.obs, case.noise, None)).actions
    for network in (case.flow, case.critic):
        for parameter in network.parameters():
            parameter.data.copy_(parameter.data * 1.1 + 0.01)
    frozen = triton.sample(Call(spec, nets, case.obs, case.noise, None, packed=packed)).actions
    live = triton.sample(Call(spec, nets, case.obs, case.noise, None)).actions
    assert torch.equal(frozen, before)
    assert not torch.equal(live, before)
    check(case)


def test_parameters_of_any_stride_dtype_and_without_bias() -> None:
    case = small(U, hidden_dims=(9, 12))
    nets = networks_of(case)
    layers = []
    for layer in nets.flow.layers:
        weight = tuple(w.detach().t().contiguous().t() for w in layer.weight)  # column-major
        layers.append(replace(layer, weight=weight, bias=None))
    flow = replace(nets.flow, layers=tuple(layers))
    critic_layers = tuple(
        replace(layer, weight=tuple(w.detach().bfloat16() for w in layer.weight)) for layer in nets.critic.layers
    )
    mixed = BoundNetworks(flow, replace(nets.critic, layers=critic_layers))
    got = backend().sample(Call(spec_of(case), mixed, case.obs, case.noise, None)).actions
    want = REFERENCE.sample(Call(spec_of(case, "float64"), mixed, case.obs.double(), case.noise.double(), None)).actions
    torch.testing.assert_close(got.double(), want, atol=FLOAT32_ERROR, rtol=0)


def test_input_blocks_in_any_order() -> None:
    case = small(M, time_embedding="fourier")
    spec, nets = spec_of(case), networks_of(case)
    orders = {
        "flow": ("t", "noisy_actions", "obs"),
        "critic": ("actions", "obs"),
        "posterior": ("u", "xbar", "t", "obs", "s", "noisy_actions"),
    }
    bound = {}
    for name, order in orders.items():
        network = getattr(nets, name)
        columns = torch.cat([torch.arange(network.spec.input_dim)[network.spec.block_slices[block]] for block in order])
        first = replace(network.layers[0], weight=tuple(w.detach()[:, columns] for w in network.layers[0].weight))
        bound[name] = replace(
            network, spec=replace(network.spec, input_order=order), layers=(first, *network.layers[1:])
        )
    reordered = replace(spec, **{name: network.spec for name, network in bound.items()})
    args = (case.obs, case.noise, case.posterior_noise)
    got = backend().sample(Call(reordered, BoundNetworks(**bound), *args)).actions
    torch.testing.assert_close(got, backend().sample(Call(spec, nets, *args)).actions, atol=FLOAT32_ERROR, rtol=0)


@pytest.mark.parametrize("name", ["flow", "critic", "posterior"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_one_network_forward_and_vjp(name: str, precision: str) -> None:
    case = small(hidden_dims=(24, 40), layer_norm=("pre", "post"), time_embedding="fourier", obs_dim=30)
    network = getattr(networks_of(case), name)
    batch_size = 19
    blocks = [torch.randn(batch_size, network.spec.block_dim(block)) for block in network.spec.input_order]
    cotangent = 100.0 * torch.randn(network.spec.num_members, batch_size, network.spec.output_dim)
    triton = backend()
    prepared = triton.prepare(network, precision)
    want = REFERENCE.forward(network, blocks, precision)
    want_vjp = REFERENCE.vjp(network, blocks, cotangent, precision)
    got, got_vjp = triton.forward(prepared, blocks, precision), triton.vjp(network, blocks, cotangent, precision)
    tolerance = dict(atol=1e-5, rtol=1e-5) if precision == "float32" else dict(atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(got, want, **tolerance)
    torch.testing.assert_close(got_vjp / 100, want_vjp / 100, **tolerance)
    assert triton.forward(prepared, [block[:0] for block in blocks], precision).shape == (len(want), 0, want.shape[-1])


def test_two_samplers_of_one_spec_keep_their_own_weights() -> None:
    first, second = small(U, hidden_dims=(9,)), small(U, hidden_dims=(9,), seed=1)
    triton = backend()
    results = [
        triton.sample(Call(spec_of(case), networks_of(case), case.obs, case.noise, None)).actions
        for case in (first, second, first)
    ]
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])


def test_gpu_checks_cover_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.gpu import check

    tiny = dict(obs_dim=5, action_dim=3, num_critics=1, hidden_dims=(9, 12), num_steps=2)
    for name, value in {
        "PRESETS": {"U": U, "QGF": Steering.qgf(0.1)},
        "ACTIVATIONS": ("relu",),
        "_CHECKED_SHAPES": (tiny,),
        "_CHECKED_BATCHES": (3,),
    }.items():
        monkeypatch.setattr(check, name, value)
    launches.reset()
    results = [f for c in (check.check_samplers, check.check_networks) for f in c("triton", "float32", "cpu")]
    products = {"layer", "output", "delta", "input_gradient"}
    assert set(launches.by_name) == {"pack", "fold", "combine", "update", *products}
    assert results and all(result.compared.passed for result in results)
