"""Every backend that runs on CPU tensors against the float64 reference."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qpilots_fast import Steering, backends
from qpilots_fast.testing import (
    BETWEEN_LAYERS,
    BFLOAT16_ERROR_OVER_TORCH,
    PRESETS,
    assert_close,
    make_case,
    random_case,
    settings_grid,
)

BATCHES = (1, 3, 17, 257)  # single row, below and above every row tile, not multiples of any


@pytest.mark.parametrize("batch_size", BATCHES)
@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets(preset, batch_size, backend):
    case = make_case(PRESETS[preset], batch_size=batch_size)
    assert_close(case.run(backend), case.expected())


@pytest.mark.parametrize("norms", [(None, "post"), ("pre", "pre"), ("post", None), ((None, "pre"), ("post", None))])
@pytest.mark.parametrize("activation", BETWEEN_LAYERS)
def test_activations_and_norms(activation, norms, backend):
    case = make_case(Steering.qpilots_m(), activation=activation, layer_norm=norms[0], critic_layer_norm=norms[1])
    assert_close(case.run(backend), case.expected())


@pytest.mark.parametrize("hidden", [(1,), (16,), (64, 48), (37, 24, 129), (200, 7, 65, 33)])
@pytest.mark.parametrize("num_critics", [1, 2, 7])
def test_widths_and_members(hidden, num_critics, backend):
    case = make_case(hidden_dims=hidden, num_critics=num_critics, time_embedding="fourier")
    assert_close(case.run(backend), case.expected())


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_bfloat16_keeps_the_gradient_of_a_layer_norm_over_two_units(norm, backend):
    """Its derivative is what is left of a difference of nearly equal numbers."""
    cases = [make_case(seed=seed, hidden_dims=(16, 2), critic_layer_norm=norm) for seed in range(8)]
    ours, torchs = (
        torch.cat([(case.run(b, "bfloat16") - case.expected()).abs() for case in cases]).mean()
        for b in (backend, "reference")
    )
    assert ours <= 2 * torchs


@pytest.mark.parametrize("members", [2, 3, 6, 7, 10])
def test_members_that_agree_are_one_member(members, backend):
    """At std = 0 the pessimistic gradient is that of the mean, whatever the mean of equal numbers rounds to."""
    steering = dataclasses.replace(Steering.qpilots_u(1.0), scale="absolute")
    one = make_case(steering, batch_size=64, num_critics=1, num_steps=2)
    many = dataclasses.replace(one, critic=make_case(num_critics=members).critic)
    with torch.no_grad():
        for single, stacked in zip(one.critic.parameters(), many.critic.parameters(), strict=True):
            stacked.copy_(single.expand_as(stacked))
    assert_close(many.run(backend), one.expected())


@pytest.mark.parametrize("preset", list(PRESETS))
def test_one_action_dimension(preset, backend):
    """A flow with one output must not be taken for a critic."""
    case = make_case(PRESETS[preset], action_dim=1, obs_dim=1)
    assert_close(case.run(backend), case.expected())


@pytest.mark.parametrize("time_embedding", ["raw", "sinusoidal", "fourier"])
def test_time_embeddings(time_embedding, backend):
    case = make_case(Steering.qpilots_m(), time_embedding=time_embedding)
    assert_close(case.run(backend), case.expected())


SETTINGS = settings_grid("noisy", "tweedie", "mfm", "glass") | {
    "steered_dims": Steering(steered_dims=(0, 3)),
    "q_scale": Steering(estimate="mfm", num_samples=3, q_scale=2.5),
    "batch_std": Steering(estimate="mfm", num_samples=3, q_scale="batch_std"),
    "first_step": Steering(steer_first_step=True),
    "step_weights": Steering(step_weights=(0.5, 0.0, 2.0, 0.0, 0.0, 1.0, 0.0, 0.25, 1.0, 0.0)),
    "step_weights_m": Steering(estimate="mfm", num_samples=2, step_weights=(0.0,) * 4 + (1.5,) + (0.0,) * 5),
    "window": Steering(window=(0.3, 0.7)),
    "window_glass": Steering(estimate="glass", num_samples=2, window=(0.5, 0.6), scale="absolute"),
    "window_around_no_step": Steering(window=(0.01, 0.02)),
    "five_glass_steps": Steering(estimate="glass", num_samples=2, glass_steps=5),
}


BOUNDS = {
    "each": ((-0.3, -1.0, 0.1, 0.0, -2.0), (0.2, 0.4, 0.7, 0.5, 2.0)),
    "one_sided": ((-0.3, -math.inf, 0.1, -math.inf, 0.0), (math.inf, 0.4, 0.7, math.inf, 0.2)),
    "high_alone": (-1.0, (0.2, 0.4, 0.7, 0.5, 2.0)),
    "none": (None, None),
}


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("clip", ["straight_through", "masked", "none"])
@pytest.mark.parametrize("estimate", ["noisy", "tweedie", "mfm", "glass"])
def test_bounds(name, clip, estimate, backend):
    draws = 2 if estimate in ("mfm", "glass") else 1
    steering = Steering(alpha=0.5, estimate=estimate, clip=clip, num_samples=draws)
    case = dataclasses.replace(make_case(steering, num_steps=4), bounds=BOUNDS[name])
    got, expected = case.run(backend), case.expected()
    assert_close(got, expected, scale=max(1.0, float(expected.abs().max())))
    low, high = (torch.as_tensor(sign * math.inf if b is None else b) for sign, b in zip((-1, 1), BOUNDS[name]))
    assert bool(((got >= low) & (got <= high)).all())
    if name != "none":  # what ends on the bounds shows that they are the ones asked for
        assert bool(((got == low) | (got == high)).any())


@pytest.mark.parametrize("estimate", ["tweedie", "mfm", "glass"])
def test_a_free_time_grid(estimate, backend):
    steering = Steering(alpha=0.5, estimate=estimate, num_samples=1 if estimate == "tweedie" else 2)
    case = make_case(steering, num_steps=4, time_embedding="sinusoidal")
    free = dataclasses.replace(case, time_grid=(0.0, 0.05, 0.3, 0.8, 1.0))
    assert_close(free.run(backend), free.expected())
    assert (free.expected() - case.expected()).abs().max() > 0.01
    even = dataclasses.replace(case, time_grid=(0.0, 0.25, 0.5, 0.75, 1.0))
    assert torch.equal(even.run(backend), case.run(backend))


@pytest.mark.parametrize("name", list(SETTINGS))
def test_settings(name, backend):
    case = make_case(SETTINGS[name])
    sampler = case.sampler(backend)
    reason = backends.get(backend).refusal(sampler._run.spec, torch.device("cpu"))
    if reason is not None:
        with pytest.raises(backends.BackendUnavailable):
            case.run(backend)
        pytest.skip(f"{backend} refuses it: {reason}")
    assert_close(case.run(backend), case.expected())


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 2**31))
def test_random_cases(seed):
    case = random_case(seed)
    expected = case.expected()
    for name in ("reference", "cpu"):
        if backends.unavailable_reason(name) is None:
            assert_close(case.run(name), expected)


def test_bfloat16(backend):
    """The bound of TOLERANCES, and at most 1.5 times the error of the same sampler in torch's own bfloat16."""
    for preset in ("qpilots_u", "qpilots_m", "qgf"):
        case = make_case(PRESETS[preset], batch_size=64, hidden_dims=(128, 96), num_critics=5)
        expected = case.expected()
        actual = case.run(backend, "bfloat16")
        assert_close(actual, expected, "bfloat16")
        torch_error = (torch_bfloat16(case).double() - expected).abs().mean()
        assert (actual.double() - expected).abs().mean() <= BFLOAT16_ERROR_OVER_TORCH * torch_error


def torch_bfloat16(case):
    """The sampler with the networks' modules in bfloat16, state in float32."""
    networks = {name: getattr(case, name).bfloat16().requires_grad_(False) for name in ("flow", "critic", "posterior")}

    def low(function):
        return lambda *inputs: function(*(x.bfloat16() if isinstance(x, torch.Tensor) else x for x in inputs)).float()

    from qpilots_fast import SteeredSampler

    sampler = SteeredSampler(
        low(networks["flow"]), low(networks["critic"]), case.steering, posterior=low(networks["posterior"]),
        num_steps=case.num_steps, backend="reference",
    )  # fmt: skip
    return sampler(case.obs, case.noise, case.posterior_noise)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", ["qpilots_u", "qpilots_m", "qgf"])
def test_rows_do_not_see_their_batch(preset, precision):
    """Bitwise: neither the other rows, nor their number, nor the thread count reach a row."""
    if backends.unavailable_reason("cpu"):
        pytest.skip("no native backend")
    case = make_case(PRESETS[preset], batch_size=70, hidden_dims=(100, 64), num_critics=4)
    sampler = case.sampler("cpu", precision)
    whole = sampler(case.obs, case.noise, case.posterior_noise)
    eps = case.posterior_noise
    for rows in (slice(0, 1), slice(69, 70), slice(3, 10), slice(1, 50)):
        part = sampler(case.obs[rows], case.noise[rows], None if eps is None else eps[:, rows])
        assert torch.equal(part, whole[rows])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(sampler(case.obs, case.noise, eps), whole)
            assert torch.equal(sampler(case.obs[:1], case.noise[:1], None if eps is None else eps[:, :1]), whole[:1])
    finally:
        torch.set_num_threads(threads)


def test_frozen_equals_live(backend):
    case = make_case(Steering.qpilots_m())
    inputs = (case.obs, case.noise, case.posterior_noise)
    assert torch.equal(case.sampler(backend).freeze()(*inputs), case.sampler(backend)(*inputs))


def test_extreme_inputs(backend):
    case = make_case()
    big = dataclasses.replace(case, obs=case.obs * 1e4, noise=case.noise * 10)
    actions = big.run(backend)
    assert torch.isfinite(actions).all() and actions.abs().max() <= 1
