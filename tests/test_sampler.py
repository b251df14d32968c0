"""SteeredSampler's contract: determinism, guards, live weights, callables, and life in a PyTorch program."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import threading

import pytest
import torch

from qpilots_fast import BackendUnavailable, CriticEnsemble, FlowMLP, SteeredSampler, Steering, backends
from qpilots_fast.testing import PRESETS, assert_close, make_case

STEERED = [name for name in PRESETS if name not in ("unsteered", "best_of_n")]


@pytest.mark.parametrize("preset", list(PRESETS))
def test_same_noise_same_actions(preset, backend):
    case = make_case(PRESETS[preset])
    first, second = case.run(backend), case.run(backend)
    assert torch.equal(first, second) and first.abs().max() <= 1
    other = case.sampler(backend)(case.obs, case.noise.flip(0), case.posterior_noise)
    assert not torch.equal(first, other)


def test_generator_decides_what_is_drawn(backend):
    case = make_case(Steering.qpilots_m())
    sampler = case.sampler(backend)
    draws = [sampler(case.obs, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("preset", STEERED)
def test_callables_equal_packed_networks(preset, backend):
    case = make_case(PRESETS[preset])
    sampler = SteeredSampler(
        lambda obs, x, t: case.flow(obs, x, t),
        lambda obs, a: case.critic(obs, a),
        case.steering,
        posterior=lambda obs, xbar, x, t: case.posterior(obs, xbar, x, t),
        backend=backend,
    )
    actual, info = sampler(case.obs, case.noise, case.posterior_noise, return_info=True)
    expected, expected_info = case.sampler("reference")(case.obs, case.noise, case.posterior_noise, return_info=True)
    assert_close(actual, expected)
    assert torch.allclose(info.q_values, expected_info.q_values, atol=1e-4)
    assert torch.allclose(info.gradient_norms, expected_info.gradient_norms, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("mixed", ["flow", "critic"])
def test_mixing_packed_and_callable(mixed, backend):
    case = make_case(Steering.qpilots_u())
    flow = (lambda *a: case.flow(*a)) if mixed == "flow" else case.flow
    critic = (lambda *a: case.critic(*a)) if mixed == "critic" else case.critic
    sampler = SteeredSampler(flow, critic, case.steering, backend=backend)
    assert_close(sampler(case.obs, case.noise), case.expected())


def test_obs_may_be_any_object():
    case = make_case()
    observation = {"image": case.obs * 2}
    sampler = SteeredSampler(
        lambda o, x, t: case.flow(o["image"] / 2, x, t), lambda o, a: case.critic(o["image"] / 2, a), case.steering
    )
    assert_close(sampler(observation, case.noise), case.expected())
    with pytest.raises(ValueError, match="no network tells the action width; give noise"):
        sampler(observation)


def test_inference_mode(backend):
    case = make_case()
    with torch.inference_mode():
        assert_close(case.run(backend), case.expected())
    identity = dataclasses.replace(case.steering, jacobian="identity")
    no_autograd = SteeredSampler(lambda *a: case.flow(*a), case.critic, identity, backend=backend)
    with torch.inference_mode():
        assert_close(no_autograd(case.obs, case.noise), case.with_steering(identity).expected())


def test_autocast_changes_nothing(backend):
    case = make_case()
    expected = case.run(backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.run(backend), expected)


def test_grad_mode_and_inputs_that_require_grad(backend):
    case = make_case()
    actions = case.sampler(backend)(case.obs.requires_grad_(), case.noise.requires_grad_())
    assert not actions.requires_grad


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_sample_the_same_and_are_independent(clone, backend):
    case = make_case()
    sampler = case.sampler(backend)
    expected = sampler(case.obs, case.noise)
    twin = clone(sampler)
    assert torch.equal(twin(case.obs, case.noise), expected)
    with torch.no_grad():
        sampler.flow.output.bias.add_(1.0)
    assert torch.equal(twin(case.obs, case.noise), expected)
    assert not torch.equal(sampler(case.obs, case.noise), expected)


def test_live_weights_see_every_kind_of_write(backend):
    case = make_case()
    sampler = case.sampler(backend)
    state = copy.deepcopy(sampler.state_dict())
    before = sampler(case.obs, case.noise)

    def optimiser_step():
        optimiser = torch.optim.SGD(sampler.flow.parameters(), lr=0.1)
        sampler.flow(case.obs, case.noise, torch.zeros(len(case.obs), 1)).sum().backward()
        optimiser.step()

    def replace_parameter():
        sampler.flow.output.bias = torch.nn.Parameter(sampler.flow.output.bias.detach() + 1)

    writes = [
        optimiser_step,
        lambda: sampler.critic.weights[0].data.mul_(-1.0),
        lambda: sampler.flow.output.weight.data.copy_(torch.randn_like(sampler.flow.output.weight)),
        lambda: setattr(sampler.flow.output.bias, "data", torch.ones_like(sampler.flow.output.bias)),
        replace_parameter,
    ]
    for write in writes:
        write()
        now = sampler(case.obs, case.noise)
        assert not torch.equal(now, before)
        assert_close(now, dataclasses.replace(case, flow=sampler.flow, critic=sampler.critic).expected())
        before = now
    sampler.load_state_dict(state)
    assert_close(sampler(case.obs, case.noise), make_case().expected())


def test_freeze_keeps_the_weights(backend):
    case = make_case()
    sampler = case.sampler(backend).freeze()
    assert sampler.frozen and "frozen" in repr(sampler)
    frozen = sampler(case.obs, case.noise)
    assert torch.equal(frozen, case.run(backend))
    with torch.no_grad():
        sampler.flow.output.bias.add_(1.0)
    assert torch.equal(sampler(case.obs, case.noise), frozen)
    assert not torch.equal(sampler.unfreeze()(case.obs, case.noise), frozen)


def test_a_frozen_sampler_that_is_moved_packs_anew(backend, caplog):
    case = make_case()
    sampler = case.sampler(backend).freeze()
    sampler(case.obs, case.noise)
    with torch.no_grad():
        sampler.flow.output.bias.add_(1.0)
    sampler.to("cpu")
    assert "a frozen SteeredSampler was moved" in caplog.text
    assert_close(sampler(case.obs, case.noise), dataclasses.replace(case, flow=sampler.flow).expected())


def test_threads_share_a_sampler(backend):
    case = make_case(batch_size=9)
    sampler = case.sampler(backend)
    expected = sampler(case.obs, case.noise)
    results: list[bool] = []

    def work() -> None:
        for _ in range(20):
            results.append(torch.equal(sampler(case.obs, case.noise), expected))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 80 and all(results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_after_use(backend):
    case = make_case()
    sampler = case.sampler(backend)
    expected = sampler(case.obs, case.noise)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(sampler(case.obs, case.noise), expected) else 1)
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        threading.Event().wait(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the forked child hung")
    assert os.waitstatus_to_exitcode(status) == 0


def test_empty_batch(backend):
    case = make_case(Steering.qpilots_m())
    actions, info = case.sampler(backend)(torch.empty(0, 7), return_info=True)
    assert actions.shape == (0, 5) and info.q_values.shape == (3, 0) and info.nonfinite_count == 0


def test_strided_inputs(backend):
    case = make_case()
    wide_obs, wide_noise = torch.randn(17, 14), torch.randn(5, 17)
    sampler = case.sampler(backend)
    expected = sampler(wide_obs[:, ::2].contiguous(), wide_noise.T.contiguous())
    assert torch.equal(sampler(wide_obs[:, ::2], wide_noise.T), expected)


@pytest.mark.parametrize("steering", [Steering.qpilots_u(), Steering.qgf(0.1, "mean"), Steering.gaf()])
def test_nonfinite_critic_rows_follow_the_flow(steering, backend):
    case = make_case(steering, batch_size=6)
    broken = {1: float("nan"), 4: float("inf")}

    def critic(obs, actions):
        q = case.critic(obs, actions)
        for row, value in broken.items():
            q = torch.where(torch.arange(6) == row, torch.full_like(q, value), q)
        return q

    actions, info = SteeredSampler(case.flow, critic, steering, backend=backend)(case.obs, case.noise, return_info=True)
    steered = case.run("reference")
    plain = case.with_steering(Steering.unsteered()).run("reference")
    rows, others = [1, 4], [0, 2, 3, 5]
    assert_close(actions[rows], plain[rows])
    assert_close(actions[others], steered[others])
    assert info.nonfinite_rows.nonzero().flatten().tolist() == rows
    steps = 10 if steering.steer_first_step else 9
    assert info.nonfinite_count == 2 * steps and info.gradient_norms[:, rows].abs().max() == 0


def test_packed_critic_with_nonfinite_rows(backend):
    """An observation that overflows the packed critic must not leave its own row."""
    case = make_case(Steering.qpilots_u(), batch_size=6, critic_layer_norm=None)
    with torch.no_grad():
        case.flow.hidden[0].weight[:, :7] = 0  # the flow ignores obs
        case.critic.weights[0][:, :, 0] = 3e38
    obs = case.obs.clone()
    obs[:, 0] = 0
    clean = case.sampler(backend)(obs, case.noise)
    obs[2, 0] = 3e38
    actions, info = case.sampler(backend)(obs, case.noise, return_info=True)
    others = [0, 1, 3, 4, 5]
    assert torch.isfinite(actions).all() and torch.equal(actions[others], clean[others])
    assert info.nonfinite_rows.nonzero().flatten().tolist() == [2]
    assert_close(actions[[2]], case.with_steering(Steering.unsteered()).sampler("reference")(obs, case.noise)[[2]])


def test_info(backend):
    case = make_case()
    actions, info = case.sampler(backend)(case.obs, case.noise, return_info=True)
    assert torch.allclose(info.q_values, case.critic(case.obs, actions), atol=1e-5)
    reference = case.double().sampler("reference")(case.obs.double(), case.noise.double(), return_info=True)[1]
    assert info.gradient_norms[0].abs().max() == 0 and info.gradient_norms.shape == (10, 17)
    assert torch.allclose(info.gradient_norms.double(), reference.gradient_norms, rtol=1e-3, atol=1e-5)


def test_best_of_n_returns_the_best_candidate(backend):
    case = make_case(Steering.best_of_n(6), batch_size=4)
    noise = torch.randn(4, 6, 5)
    sampler = case.sampler(backend)
    best, info = sampler(case.obs, noise, return_info=True)
    plain = case.with_steering(Steering.unsteered()).sampler(backend)
    candidates = torch.stack([plain(case.obs, noise[:, n]) for n in range(6)])
    values = torch.stack([case.critic(case.obs, a).mean(0) for a in candidates])
    assert torch.equal(best, candidates[values.argmax(0), torch.arange(4)])
    assert torch.allclose(info.q_values.mean(0), values.amax(0), atol=1e-5)
    steered = dataclasses.replace(Steering.qgf(0.1), num_candidates=4)  # QGF with best-of-n on top
    assert_close(case.with_steering(steered).run(backend), case.with_steering(steered).expected())


def test_guards(backend):
    case = make_case()
    sampler = case.sampler(backend)
    nan_obs, inf_noise = case.obs.clone(), case.noise.clone()
    nan_obs[0, 0], inf_noise[0, 0] = float("nan"), float("inf")
    for call, error, message in (
        (lambda: sampler(case.obs[:, :3]), ValueError, r"obs has shape \[17, 3\]; expected \[B, 7\]"),
        (
            lambda: sampler(case.obs[0], case.noise),
            ValueError,
            r"noise has shape \[17, 5\]; expected \[5\] or \[C, D\]",
        ),
        (lambda: sampler(case.obs.long()), TypeError, "expected a floating dtype"),
        (lambda: sampler(case.obs, case.noise[:3]), ValueError, "noise has 3 rows, obs 17"),
        (lambda: sampler(case.obs, case.noise[:, :2]), ValueError, r"expected \[17, 5\]"),
        (lambda: sampler(case.obs, "noise"), TypeError, "noise is str"),
        (lambda: sampler(nan_obs, case.noise), ValueError, "obs has 1 non-finite values"),
        (lambda: sampler(case.obs, inf_noise), ValueError, "noise has 1 non-finite values"),
        (lambda: sampler(case.obs.to("meta"), case.noise), ValueError, "obs is on meta"),
    ):
        with pytest.raises(error, match=message):
            call()
    m = make_case(Steering.qpilots_m()).sampler(backend)
    with pytest.raises(ValueError, match=r"expected \[10, 17, 4, 5\]"):
        m(case.obs, case.noise, torch.randn(9, 17, 4, 5))


def test_a_broken_flow_raises_rather_than_acting(backend):
    case = make_case()
    with torch.no_grad():
        case.flow.output.bias[0] = float("nan")
    with pytest.raises(ValueError, match="velocity is not finite in rows"):
        case.run(backend)


def test_construction_errors():
    flow, critic = FlowMLP(7, 5, (8,)), CriticEnsemble(7, 5, 2, (8,))
    u = Steering.qpilots_u()
    for build, error, message in (
        (lambda: SteeredSampler(flow, critic, u, num_steps=0), ValueError, "num_steps is 0"),
        (lambda: SteeredSampler(flow, critic, u, precision="int8"), ValueError, "precision is 'int8'"),
        (lambda: SteeredSampler(flow, critic, u, backend="tpu"), ValueError, "backend is 'tpu'"),
        (lambda: SteeredSampler(flow, critic, u, action_low=1), ValueError, "action_low < action_high"),
        (lambda: SteeredSampler(flow, None, u), ValueError, "critic is None"),
        (lambda: SteeredSampler(flow, critic, Steering.qpilots_m()), ValueError, "posterior is None"),
        (lambda: SteeredSampler(critic, critic, u), TypeError, "flow is a critic network"),
        (lambda: SteeredSampler(flow, CriticEnsemble(7, 4, 2, (8,)), u), ValueError, "expected the same"),
        (lambda: SteeredSampler(flow, critic, "u"), TypeError, "expected a Steering"),
        (lambda: SteeredSampler(flow, critic, Steering(steered_dims=(9,))), ValueError, "below action_dim=5"),
    ):
        with pytest.raises(error, match=message):
            build()
    SteeredSampler(flow, None, Steering.unsteered())(torch.randn(2, 7))


def test_callables_with_wrong_outputs():
    case = make_case()
    with pytest.raises(ValueError, match=r"flow returned shape \[17, 4\]; expected \[17, 5\]"):
        SteeredSampler(lambda o, x, t: x[:, :4], case.critic, case.steering)(case.obs, case.noise)
    with pytest.raises(ValueError, match=r"critic returned shape \[16\] for 17 rows; expected \[E, 17\]"):
        SteeredSampler(case.flow, lambda o, a: a[1:].sum(-1), case.steering)(case.obs, case.noise)
    with pytest.raises(RuntimeError, match="does not depend differentiably"):
        SteeredSampler(case.flow, lambda o, a: a.detach().sum(-1)[None], case.steering)(case.obs, case.noise)


@pytest.mark.parametrize("flow", ["packed", "callable"])  # two loops, or one graph a step
def test_critic_whose_weights_alone_require_grad(flow):
    case = make_case()
    q = torch.nn.Linear(5, 1)
    own = case.flow if flow == "packed" else lambda o, x, t: torch.tanh(x) * (1 + t)
    with pytest.raises(RuntimeError, match="critic's output does not depend differentiably on its actions"):
        SteeredSampler(own, lambda o, a: q(a.detach()), case.steering)(case.obs, case.noise)


def test_named_backend_that_cannot_run_raises():
    case = make_case()
    missing = [name for name in backends.BACKENDS if backends.unavailable_reason(name) is not None]
    for name in missing:
        with pytest.raises(BackendUnavailable, match=f"backend '{name}' cannot run here"):
            case.sampler(name)
    with pytest.raises(TypeError, match="expected float32"):
        if "cpu" in missing:
            pytest.skip("no native backend")
        case.double().sampler("cpu")(case.obs.double(), case.noise.double())


def test_explain(backend):
    explanation = make_case().sampler(backend).explain(4)
    assert explanation.backend == backend and "flops" in str(explanation)
    assert explanation.footprint.flops == 4 * make_case().sampler(backend).explain(1).footprint.flops


def test_float64_inputs_are_computed_in_float64():
    case = make_case().double()
    assert case.run("reference").dtype == torch.float64
    assert case.run("auto").dtype == torch.float64


@pytest.mark.parametrize("mixed", ["flow", "critic"])
def test_float64_with_a_callable(mixed):
    case = make_case().double()
    flow = (lambda *a: case.flow(*a)) if mixed == "flow" else case.flow
    critic = (lambda *a: case.critic(*a)) if mixed == "critic" else case.critic
    actions, info = SteeredSampler(flow, critic, case.steering)(case.obs, case.noise, return_info=True)
    assert actions.dtype == info.q_values.dtype == torch.float64
    assert (actions - case.run("reference")).abs().max() < 1e-12


def test_precision_that_no_backend_here_has():
    case = make_case()
    for flow in (case.flow, lambda *a: case.flow(*a)):
        with pytest.raises(BackendUnavailable, match="tf32"):
            SteeredSampler(flow, case.critic, case.steering, precision="tf32")(case.obs, case.noise)
