"""Flax trees as networks: by numpy arrays always, and against flax's own modules where flax is installed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from qpilots_fast import CriticEnsemble, FlowMLP, MetaFlowMap, SteeredSampler, Steering
from qpilots_fast.integrations.flax import from_flax

OBS, ACTION, BATCH = 5, 3, 7
RANDOM = np.random.default_rng(0)


def tree(widths: list[int], members: int | None = None, norms: bool = True) -> dict[str, Any]:
    """An MLP's parameters by flax's names."""
    lead = () if members is None else (members,)

    def array(*shape: int) -> np.ndarray:
        return RANDOM.normal(size=(*lead, *shape), scale=0.3).astype(np.float32)

    made: dict[str, Any] = {}
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        made[f"Dense_{i}"] = {"kernel": array(fan_in, fan_out), "bias": array(fan_out)}
        if norms and i < len(widths) - 2:
            made[f"LayerNorm_{i}"] = {"scale": 1 + array(fan_out), "bias": array(fan_out)}
    return made


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def run(layers: dict[str, Any], x: np.ndarray, member: int | None = None) -> np.ndarray:
    """The MLP in float64: Dense, GELU, LayerNorm."""
    count = sum(name.startswith("Dense") for name in layers)

    def of(name: str, entry: str) -> np.ndarray:
        value = layers[name][entry].astype(np.float64)
        return value if member is None else value[member]

    for i in range(count):
        x = x @ of(f"Dense_{i}", "kernel") + of(f"Dense_{i}", "bias")
        if i == count - 1:
            return x
        x = gelu(x)
        if f"LayerNorm_{i}" in layers:
            mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
            x = (x - mean) / np.sqrt(var + 1e-6) * of(f"LayerNorm_{i}", "scale") + of(f"LayerNorm_{i}", "bias")
    return x


def columns(*dims: int) -> list[torch.Tensor]:
    return [torch.from_numpy(RANDOM.random((BATCH, dim)).astype(np.float32)) for dim in dims]


def joined(blocks: list[torch.Tensor]) -> np.ndarray:
    return torch.cat(blocks, -1).double().numpy()


def close(actual: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual.detach().double().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_flow() -> None:
    layers = tree([OBS + ACTION + 1, 16, 12, ACTION])
    flow = from_flax({"mlp": layers}, "flow")
    assert isinstance(flow, FlowMLP) and flow.spec.obs_dim == OBS and flow.spec.layer_norm == ("post", "post")
    blocks = columns(OBS, ACTION, 1)
    close(flow(*blocks), run(layers, joined(blocks)))


def test_a_flow_without_norms_and_with_one() -> None:
    layers = tree([OBS + ACTION + 1, 16, 12, ACTION], norms=False)
    layers["LayerNorm_1"] = {"scale": np.full(12, 1.5, np.float32)}  # without its bias
    flow = from_flax(layers)
    assert flow.spec.layer_norm == (None, "post")
    blocks = columns(OBS, ACTION, 1)
    layers["LayerNorm_1"]["bias"] = np.zeros(12, np.float32)
    close(flow(*blocks), run(layers, joined(blocks)))


@pytest.mark.parametrize("given", [dict(action_dim=ACTION), dict(obs_dim=OBS), dict(obs_dim=OBS, action_dim=ACTION)])
def test_an_ensemble_of_critics(given: dict[str, int]) -> None:
    layers = tree([OBS + ACTION, 16, 12, 1], members=4)
    critic = from_flax({"params": {"value_net": layers}}, "critic", **given)
    assert isinstance(critic, CriticEnsemble) and critic.spec.num_members == 4
    blocks = columns(OBS, ACTION)
    close(critic(*blocks), np.stack([run(layers, joined(blocks), member)[:, 0] for member in range(4)]))


def test_a_list_of_critics_and_a_single_one() -> None:
    members = [tree([OBS + ACTION, 16, 1]) for _ in range(3)]
    blocks = columns(OBS, ACTION)
    expected = np.stack([run(member, joined(blocks))[:, 0] for member in members])
    close(from_flax(members, "critic", obs_dim=OBS)(*blocks), expected)
    close(from_flax(members[1], "critic", obs_dim=OBS)(*blocks), expected[1:2])


def test_a_meta_flow_map_and_embedded_times() -> None:
    layers = tree([OBS + 2 * ACTION + 3, 16, ACTION])
    mapped = from_flax(layers, "meta_flow_map")
    assert isinstance(mapped, MetaFlowMap) and mapped.spec.obs_dim == OBS
    obs, xbar, x, t = columns(OBS, ACTION, ACTION, 1)
    zero, one = torch.zeros(BATCH, 1), torch.ones(BATCH, 1)
    close(mapped(obs, xbar, x, t), xbar.double().numpy() + run(layers, joined([obs, xbar, x, t, zero, one])))
    flow = from_flax(tree([OBS + ACTION + 64, 16, ACTION]), time_embedding="fourier")
    assert flow.spec.obs_dim == OBS and flow.spec.time_embedding == "fourier"


def test_arrays_are_copied() -> None:
    layers = tree([OBS + ACTION + 1, 8, ACTION])
    flow, blocks = from_flax(layers), columns(OBS, ACTION, 1)
    before = flow(*blocks)
    layers["Dense_0"]["kernel"][:] = 0
    assert torch.equal(flow(*blocks), before)


def test_it_samples() -> None:
    flow = from_flax(tree([OBS + ACTION + 1, 16, ACTION]))
    critic = from_flax(tree([OBS + ACTION, 16, 1], members=2), "critic", action_dim=ACTION)
    sampler = SteeredSampler(flow, critic, Steering.qpilots_u(), num_steps=3)
    assert sampler(torch.randn(BATCH, OBS)).shape == (BATCH, ACTION)


REFUSED: dict[str, tuple[Any, str, dict[str, Any], str]] = {
    "several modules": ({"actor": {}, "critic": {}}, "flow", {}, r"has actor, critic; expected one module's subtree"),
    "an encoder": (tree([9, 8, ACTION]) | {"encoder": {}}, "flow", {}, "has encoder beside its 2 Dense layers"),
    "an ensemble as a flow": (tree([9, 8, ACTION], 2), "flow", {}, "those of an ensemble"),
    "a flow as a critic": (tree([9, 8, ACTION]), "critic", {"obs_dim": OBS}, "gives 3 numbers; expected 1"),
    "a critic without dims": (tree([8, 8, 1]), "critic", {}, "expected obs_dim= or action_dim="),
    "dims that do not add up": (tree([8, 8, 1]), "critic", {"obs_dim": 4, "action_dim": 3}, "reads 8 columns"),
    "no columns left": (tree([4, 8, ACTION]), "flow", {}, "0 are left for obs"),
    "another obs_dim": (tree([9, 8, ACTION]), "flow", {"obs_dim": 4}, "5 are left for obs, expected 4"),
    "another action_dim": (tree([9, 8, ACTION]), "flow", {"action_dim": 4}, "action_dim is 4"),
    "one layer": (tree([9, ACTION]), "flow", {}, "has 1 Dense layer"),
    "widths that do not meet": (
        tree([9, 8, ACTION]) | {"Dense_1": tree([7, ACTION])["Dense_0"]}, "flow", {}, "Dense_1.kernel",
    ),
    "a missing layer": ({"Dense_0": tree([9, 8])["Dense_0"], "Dense_2": {}}, "flow", {}, r"Dense_\[0, 2\]"),
    "no kernel": ({"Dense_0": {"w": 1}, "Dense_1": {}}, "flow", {}, "has w; expected kernel"),
    "a bias of another width": (
        tree([9, 8, ACTION]) | {"LayerNorm_0": {"scale": np.ones(7)}}, "flow", {}, r"scale has shape \[7\]",
    ),
    "NaN": ({"Dense_0": {"kernel": np.full((9, 8), np.nan)}, "Dense_1": {}}, "flow", {}, "non-finite"),
    "unequal members": ([tree([8, 8, 1]), tree([8, 9, 1])], "critic", {"obs_dim": OBS}, r"params\[1\] has layers"),
    "an empty list": ([], "critic", {}, "empty list"),
    "an unknown kind": ({}, "actor", {}, "kind is 'actor'"),
    "an unknown activation": ({}, "flow", {"activation": "swish"}, "activation is 'swish'"),
    "an unknown embedding": (tree([9, 8, ACTION]), "flow", {"time_embedding": "sine"}, "time_embedding is 'sine'"),
}  # fmt: skip


@pytest.mark.parametrize("given, kind, hints, words", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(given: Any, kind: str, hints: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_flax(given, kind, **hints)


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="expected a mapping"):
        from_flax(np.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected one subtree"):
        from_flax([tree([9, 8, ACTION])], "flow")


def test_against_flax_itself() -> None:
    """An MLP and a vmapped ensemble in the shapes of OGBench's agents (ActorVectorField, Value)."""
    nn = pytest.importorskip("flax.linen", reason="flax is not installed")
    jax = pytest.importorskip("jax")

    class MLP(nn.Module):
        widths: tuple[int, ...]

        @nn.compact
        def __call__(self, x: Any) -> Any:
            for width in self.widths[:-1]:
                x = nn.LayerNorm()(nn.gelu(nn.Dense(width)(x)))
            return nn.Dense(self.widths[-1])(x)

    ensemble = nn.vmap(
        MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, out_axes=0, axis_size=3
    )
    blocks = columns(OBS, ACTION, 1)
    x = torch.cat(blocks, -1).numpy()
    module = MLP((16, 12, ACTION))
    params = module.init(jax.random.PRNGKey(0), x)
    close(from_flax(params)(*blocks), np.asarray(module.apply(params, x), np.float64))
    module, x = ensemble((16, 12, 1)), x[:, :-1]
    params = module.init(jax.random.PRNGKey(1), x)
    critic = from_flax(params, "critic", obs_dim=OBS)
    close(critic(*blocks[:2]), np.asarray(module.apply(params, x), np.float64)[..., 0])
