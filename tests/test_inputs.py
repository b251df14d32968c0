"""What a sampler may be called with: leading dimensions, numpy arrays, dtypes, chunks and seeds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from qpilots_fast import CriticEnsemble, FlowMLP, SteeredSampler, Steering
from qpilots_fast.testing import make_case

M = Steering.qpilots_m()


def chunked_case(steering: Steering = M):
    return make_case(steering, batch_size=6, action_dim=12, hidden_dims=(16,))


@pytest.mark.parametrize("lead", [(), (1,), (6,), (2, 3), (1, 2, 3)])
def test_any_leading_dimensions(lead, backend):
    case = make_case(M, batch_size=6)
    sampler, rows = case.sampler(backend), int(np.prod(lead))
    obs, noise, eps = case.obs[:rows], case.noise[:rows], case.posterior_noise[:, :rows]
    expected, flat = sampler(obs, noise, eps, return_info=True)
    for _ in range(2):  # the second by the quick way
        folded = obs.reshape(*lead, 7), noise.reshape(*lead, 5), eps.reshape(10, *lead, 4, 5)
        assert torch.equal(sampler(*folded), expected.reshape(*lead, 5))
    info = sampler(*folded, return_info=True)[1]
    assert info.q_values.shape == (3, *lead) and info.gradient_norms.shape == info.nonfinite.shape == (10, *lead)
    assert torch.equal(info.gradient_norms.reshape(10, rows), flat.gradient_norms)
    assert info.nonfinite_rows.shape == lead
    assert sampler(folded[0]).shape == (*lead, 5)
    with pytest.raises(ValueError, match="noise has"):
        sampler(folded[0], torch.randn(*lead, 4))


def test_numpy_arrays(backend):
    case = make_case(M)
    sampler = case.sampler(backend)
    expected = sampler(case.obs, case.noise, case.posterior_noise)
    arrays = [value.numpy() for value in (case.obs, case.noise, case.posterior_noise)]
    read_only = arrays[0].copy()
    read_only.setflags(write=False)
    assert torch.equal(sampler(read_only, *arrays[1:]), expected)
    swapped = arrays[0].astype(arrays[0].dtype.newbyteorder())
    assert torch.equal(sampler(swapped, *arrays[1:]), expected)
    assert torch.equal(sampler(arrays[0][::-1][::-1].astype(np.float64), *arrays[1:]), expected)
    for bad, message in (
        ({"state": case.obs}, "obs is dict.*callables that read your obs"),
        (case.obs.tolist(), r"obs is list.*torch\.as_tensor"),
        (arrays[0].astype(np.int64), "expected a floating dtype"),
        (arrays[0].astype(object), "expected floating numbers"),
    ):
        with pytest.raises(TypeError, match=message):
            sampler(bad, case.noise, case.posterior_noise)
    with pytest.raises(TypeError, match="noise is list"):
        sampler(case.obs, case.noise.tolist())


def test_float64_inputs_of_float32_networks_are_cast(backend):
    case = make_case()
    sampler = case.sampler(backend)
    expected = sampler(case.obs, case.noise)
    for obs, noise in ((case.obs.double(), case.noise), (case.obs, case.noise.double())):
        actions = sampler(obs, noise)
        assert actions.dtype == torch.float32 and torch.equal(actions, expected)
    own = SteeredSampler(lambda *a: case.flow(*a), case.critic, case.steering)
    assert own(case.obs.double(), case.noise.double()).dtype == torch.float32


@pytest.mark.parametrize("name, steering", [("U", Steering.qpilots_u()), ("M", M), ("best", Steering.best_of_n(3))])
def test_chunks_are_bitwise_the_flat_call(name, steering, backend):
    case = chunked_case(steering)
    sampler = case.sampler(backend)
    eps = case.posterior_noise
    expected = sampler(case.obs, case.noise, eps)
    chunk_eps = None if eps is None else eps.unflatten(-1, (3, 4))
    noise = case.noise.view(6, 3, 4)
    if name == "best":
        noise, expected = torch.randn(6, 3, 3, 4), None
        expected = sampler(case.obs, noise.flatten(2))
    actions = sampler(case.obs, noise, chunk_eps)
    assert torch.equal(actions, expected.view(6, 3, 4))
    assert torch.equal(sampler(case.obs, noise, eps), actions)
    assert torch.equal(sampler(case.obs.view(2, 3, 7), noise.view(2, 3, *noise.shape[1:]), None), actions.view(
        2, 3, 3, 4)) or eps is not None  # fmt: skip


def test_candidates_of_three_dimensions_are_flat(backend):
    sampler = chunked_case(Steering.best_of_n(4)).sampler(backend)
    obs = torch.randn(6, 7)
    assert sampler(obs, torch.randn(6, 4, 12)).shape == (6, 12)
    with pytest.raises(ValueError, match=r"expected \[6, 12\] or \[6, 4, 12\] or \[6, 4, C, D\]"):
        sampler(obs, torch.randn(6, 3, 4))


@pytest.mark.parametrize("count", [1, 3])
def test_callables_see_chunks(count):
    case = chunked_case()
    steering = replace(case.steering, num_candidates=count)
    seen = set()

    def flow(obs, x, t):
        seen.add(tuple(x.shape))
        return case.flow(obs, x.flatten(1), t).view_as(x)

    def critic(obs, a):
        seen.add(tuple(a.shape))
        return case.critic(obs, a.flatten(1))

    def posterior(obs, xbar, x, t):
        seen.update((tuple(xbar.shape), tuple(x.shape)))
        return case.posterior(obs, xbar.flatten(1), x.flatten(1), t).view_as(x)

    own = SteeredSampler(flow, critic, steering, posterior=posterior, chunk_shape=(3, 4))
    packed = replace(case, steering=steering).sampler("reference")
    expected = packed(case.obs, case.noise, case.posterior_noise)
    chunked = own(case.obs, case.noise.view(6, 3, 4), case.posterior_noise.unflatten(-1, (3, 4)))
    torch.testing.assert_close(chunked, expected.view(6, 3, 4), rtol=0, atol=1e-5)
    flat = own(case.obs, case.noise, case.posterior_noise)
    assert torch.equal(flat, chunked.flatten(1)), "the actions have the noise's shape"
    assert own(case.obs, seeds=range(6)).shape == (6, 3, 4) and own(case.obs[0]).shape == (3, 4)
    assert seen == {(6, 3, 4), (1, 3, 4)}
    wrong = SteeredSampler(lambda obs, x, t: x.flatten(1), critic, replace(steering, alpha=0.0))
    with pytest.raises(ValueError, match=r"flow returned shape \[6, 12\]; expected \[6, 3, 4\]"):
        wrong(case.obs, torch.randn(6, count, 3, 4) if count > 1 else torch.randn(6, 3, 4))


def test_chunk_shape_where_noise_is_drawn(backend):
    case = chunked_case()
    sampler = SteeredSampler(
        case.flow, case.critic, case.steering, posterior=case.posterior, backend=backend, chunk_shape=[np.int64(3), 4]
    )
    for _ in range(2):
        torch.manual_seed(5)
        chunked = sampler(case.obs)
        torch.manual_seed(5)
        assert torch.equal(chunked.flatten(1), case.sampler(backend)(case.obs)) and chunked.shape == (6, 3, 4)
    for bad in ((5, 4), (3, 0), 12, (True, 12)):
        with pytest.raises(ValueError, match="chunk_shape is"):
            sampler.chunk_shape = bad
    assert sampler.chunk_shape == (3, 4)


@pytest.mark.parametrize("steering", [Steering.qpilots_u(), M, Steering.best_of_n(3)])
def test_a_row_of_seeds_is_the_same_in_any_batch(steering, backend):
    case = make_case(steering)
    sampler = case.sampler(backend)
    seeds = [3, 2**63, -1, *range(14)]
    together = sampler(case.obs, seeds=seeds)
    # torch's products, those of the reference, round otherwise in another batch
    same = torch.equal if backend == "cpu" else torch.allclose
    for row in (0, 2, 16):
        assert same(sampler(case.obs[row], seeds=[np.int64(seeds[row])]), together[row])
    assert same(sampler(case.obs.flip(0), seeds=seeds[::-1]), together.flip(0))
    assert not torch.equal(sampler(case.obs, seeds=[9, *seeds[1:]])[0], together[0])
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    assert torch.equal(sampler(case.obs, seeds=generators), together)
    assert not torch.equal(sampler(case.obs, seeds=generators), together), "a generator goes on"


def test_seeds_beside_noise():
    case = make_case(M)
    sampler, seeds = case.sampler("reference"), torch.arange(17)
    whole = sampler(case.obs, seeds=seeds)
    first = torch.cat([torch.empty(1, 5).normal_(generator=torch.Generator().manual_seed(s)) for s in range(17)])
    assert torch.equal(sampler(case.obs, first, seeds=seeds), whole)
    for arguments, error, message in (
        (
            {"noise": first, "posterior_noise": case.posterior_noise, "seeds": seeds},
            ValueError,
            "nothing is left to draw",
        ),
        ({"generator": torch.Generator(), "seeds": seeds}, ValueError, "both generator and seeds"),
        ({"seeds": [1, 2]}, ValueError, "2 entries, the call 17 rows"),
        ({"seeds": [True] * 17}, TypeError, "seeds has True"),
        ({"seeds": [0.5] * 17}, TypeError, r"seeds has 0\.5"),
        ({"seeds": 3}, TypeError, "seeds is int"),
        ({"seeds": [2**64] * 17}, ValueError, "64 bits"),
    ):
        with pytest.raises(error, match=message):
            sampler(case.obs, **arguments)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_act_is_what_an_environment_loop_calls(dtype, backend):
    case = make_case(M)
    sampler, obs = case.sampler(backend), case.obs.numpy().astype(dtype)
    many = sampler.act(obs, seeds=range(17))
    one = sampler.act(obs[4], seeds=[4])
    assert many.shape == (17, 5) and one.shape == (5,) and many.dtype == one.dtype == np.float32
    np.testing.assert_allclose(one, many[4], rtol=0, atol=0 if backend == "cpu" else 1e-6)
    assert np.array_equal(sampler.act(torch.from_numpy(obs), seeds=range(17)), many)
    assert sampler.act(obs.reshape(1, 17, 7)).shape == (1, 17, 5)
    assert case.double().sampler("reference").act(obs).dtype == np.float32


@pytest.mark.parametrize("steering", [Steering.qpilots_u(), Steering.best_of_n(4), Steering.qpilots_m()])
def test_compiled_with_drawn_noise_at_other_batch_sizes(steering):
    case = make_case(steering, hidden_dims=(8,))
    sampler = case.sampler("reference")
    compiled = torch.compile(sampler, fullgraph=True, backend="eager")
    for batch in (4, 8, 16):
        assert compiled(case.obs[:batch]).shape == (batch, 5)
        eps = None if case.posterior_noise is None else case.posterior_noise[:, :batch]
        given = case.obs[:batch], case.noise[:batch], eps
        torch.testing.assert_close(compiled(*given), sampler(*given), rtol=0, atol=1e-5)


CALLED = {
    "flow": lambda case: lambda obs, x, t: case.flow(obs, x.flatten(1), t).view_as(x),
    "critic": lambda case: lambda obs, a: case.critic(obs, a.flatten(1)),
    "posterior": lambda case: lambda obs, e, x, t: case.posterior(obs, e.flatten(1), x.flatten(1), t).view_as(x),
}


@pytest.mark.parametrize("which", [("flow", "critic", "posterior"), ("critic",), ("flow",)], ids=", ".join)
@pytest.mark.parametrize("steering", [Steering.qpilots_u(), Steering.qpilots_m(), Steering.best_of_n(4)])
def test_compiled_with_callables(steering, which):
    """The loop runs as it is inside a compiled program: with the same draws, so with the same bits."""
    case = make_case(replace(steering, num_candidates=4), hidden_dims=(8,), num_steps=3)
    networks = {name: getattr(case, name) for name in ("flow", "critic", "posterior")}
    networks |= {name: CALLED[name](case) for name in which}
    sampler = SteeredSampler(**networks, steering=case.steering, num_steps=3, chunk_shape=(5, 1))
    frames = CompileCounter()
    compiled = torch.compile(lambda *a, **named: 2 * sampler(2 * a[0], *a[1:], **named), backend=frames)

    def assert_same(*inputs, **named):
        torch.manual_seed(7)
        expected = 2 * sampler(2 * inputs[0], *inputs[1:], **named)
        torch.manual_seed(7)
        assert torch.equal(compiled(*inputs, **named), expected)

    for batch in (4, 8, 16):
        eps = None if case.posterior_noise is None else case.posterior_noise[:, :batch]
        assert_same(case.obs[:batch], case.noise[:batch], eps)
        assert_same(case.obs[:batch])
        assert_same(case.obs[:batch], seeds=range(batch))
    assert frames.op_count <= 2 * frames.frame_count  # nothing of the loop was traced
    with pytest.raises(Exception, match=r"torch\.(compiler|_dynamo)\.disable"):
        torch.compile(sampler, backend="eager", fullgraph=True)(case.obs, case.noise)


def test_act_with_observations_of_any_structure():
    flow = FlowMLP(3, 4, (8,))
    own = lambda obs, x, t: flow(obs["state"], x.flatten(1), t).view_as(x)  # noqa: E731
    sampler = SteeredSampler(own, None, Steering.unsteered(), chunk_shape=(2, 2), action_low=None, action_high=None)
    obs = {"state": np.random.randn(5, 3).astype(np.float32), "task": ["a"] * 5}
    chunks = sampler.act(obs, seeds=range(5))
    assert chunks.shape == (5, 2, 2)
    packed = SteeredSampler(flow, None, Steering.unsteered(), action_low=None, action_high=None)
    np.testing.assert_allclose(chunks.reshape(5, 4), packed.act(obs["state"], seeds=range(5)), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="whose tensors all have B rows"):
        sampler.act({"state": obs["state"][0]})


def test_alpha_as_a_list_or_for_one_observation():
    case = make_case(Steering.qpilots_u(), batch_size=3)
    sampler = case.sampler("reference")
    rows = [0.0, 0.3, 1.0]
    expected = sampler(case.obs, case.noise, alpha=torch.tensor(rows))
    for alpha in (rows, tuple(rows), np.float32(rows)):
        assert torch.equal(sampler(case.obs, case.noise, alpha=alpha), expected)
    for alpha in ([0.3], 0.3, torch.tensor([0.3])):
        assert torch.allclose(sampler(case.obs[1], case.noise[1], alpha=alpha), expected[1], atol=1e-6)


@pytest.mark.parametrize("steering", [Steering.qpilots_u(), Steering.best_of_n(2)])
def test_compiled_after_what_cannot_be_traced(steering):
    case = make_case(steering, hidden_dims=(8,), num_steps=2)
    sampler = case.sampler("reference")
    compiled = torch.compile(sampler, backend="eager")
    seeds = list(range(17))
    for call in (
        lambda run: run(case.obs, seeds=seeds),
        lambda run: run(case.obs, generator=torch.Generator().manual_seed(1)),
        lambda run: run(case.obs.numpy(), case.noise),
        lambda run: run(case.obs, case.noise),
    ):
        torch.testing.assert_close(call(compiled), call(sampler), rtol=0, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_with_a_dynamic_batch(strict):
    from torch.export import Dim, export

    case = make_case(Steering.qpilots_u(), hidden_dims=(8,), num_steps=2)
    sampler, rows = case.sampler("reference"), {0: Dim("batch")}
    exported = export(sampler, (case.obs, case.noise), dynamic_shapes={"obs": rows, "noise": rows}, strict=strict)
    for size in (9, 17):
        found = exported.module()(case.obs[:size], case.noise[:size])
        torch.testing.assert_close(found, sampler(case.obs[:size], case.noise[:size]), rtol=0, atol=1e-5)


def test_bounds_of_each_dimension_tell_the_width_that_callables_do_not():
    flow, critic = FlowMLP(3, 6, (8,)), CriticEnsemble(3, 6, 2, (8,))
    bounds = dict(action_low=[-1.0] * 6, action_high=np.ones(6))
    sampler = SteeredSampler(
        lambda obs, x, t: flow(obs["state"], x, t),
        lambda obs, a: critic(obs["state"], a),
        Steering.qpilots_u(),
        **bounds,
    )
    obs = {"state": torch.randn(4, 3)}
    assert sampler.warm_up((2,), obs).act(obs).shape == (4, 6)


def test_a_backend_is_checked_when_it_is_assigned():
    sampler = SteeredSampler(FlowMLP(3, 2, (8,)), None, Steering.unsteered())
    with pytest.raises(ValueError, match="backend is 'gpu'; expected 'auto' or one of"):
        sampler.backend = "gpu"
    assert sampler.backend == "auto"


def test_what_says_no_batch_size_ends_with_a_way_out():
    sampler = SteeredSampler(
        lambda o, x, t: -x, lambda o, a: a.sum(-1), Steering.qpilots_u(), action_low=[-1.0] * 2, action_high=1.0
    )
    obs = {"state": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match=r"a batch of one: \{key: value\[None\]"):
        sampler.act(obs)
    assert sampler.act({key: value[None] for key, value in obs.items()})[0].shape == (2,)
    with pytest.raises(ValueError, match=r"one strength a row\. One for all rows is Steering's alpha"):
        sampler(torch.zeros(2, 3), alpha=0.3)
