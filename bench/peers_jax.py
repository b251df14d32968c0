"""The JAX peer: the same loop as peers.py, one jit of a lax.scan over the steps. Optional: `pip install jax`."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from .cases import Workload
from .peers import DTYPES, Run
from .stacked import StackedNetwork


def unavailable_reason() -> str | None:
    """Why JAX cannot run here, or None where it can."""
    if importlib.util.find_spec("jax") is None:
        return "jax is not installed (pip install jax)"
    try:
        import jax

        jax.devices()
    except (ImportError, RuntimeError) as error:
        return f"jax does not start: {error}"
    return None


def _array(tensor: Tensor | None) -> Any:
    import jax.numpy as jnp

    if tensor is None:
        return None
    dtype = jnp.bfloat16 if tensor.dtype == torch.bfloat16 else jnp.float32
    return jnp.asarray(tensor.float().cpu().numpy(), dtype)


def _arrays(network: StackedNetwork) -> dict[str, Any]:
    """The stacked weights as a pytree of JAX arrays."""
    return {
        "first": {block: _array(weight) for block, weight in network.first.items()},
        "biases": [_array(bias) for bias in network.biases],
        "weights": [_array(weight) for weight in network.weights],
        "norms": [[(_array(weight), _array(bias)) for weight, bias in norms] for norms in network.norms],
        "time": _array(network.time),
    }


def _rest(arrays: dict[str, Any], spec: Any, z: Any) -> Any:
    """Everything after the first layer's product; LayerNorm's statistics in float32."""
    import jax
    import jax.numpy as jnp

    activations = {
        "gelu_tanh": lambda h: jax.nn.gelu(h, approximate=True),
        "gelu": lambda h: jax.nn.gelu(h, approximate=False),
        "relu": jax.nn.relu, "silu": jax.nn.silu, "mish": jax.nn.mish, "tanh": jnp.tanh,
        "elu": jax.nn.elu, "selu": jax.nn.selu, "softplus": jax.nn.softplus, "sigmoid": jax.nn.sigmoid,
        "symexp": lambda h: jnp.sign(h) * jnp.expm1(jnp.abs(h)),
    }  # fmt: skip

    def normalise(h: Any, weight: Any, bias: Any, eps: float) -> Any:
        wide = h.astype(jnp.float32)
        mean = wide.mean(-1, keepdims=True)
        wide = (wide - mean) * jax.lax.rsqrt(wide.var(-1, keepdims=True) + eps)
        wide = wide if weight is None else wide * weight
        return (wide if bias is None else wide + bias).astype(h.dtype)

    kept = None
    for index, chain in enumerate(spec.row_chains):
        norms = iter(arrays["norms"][index])
        for op in chain:
            if op.name == "keep":
                kept = z
            elif op.name == "add":
                z = z + kept
            elif op.kind == "layer_norm":
                z = normalise(z, *next(norms), op.numbers[0])
            elif op.name == "softmax":
                z = jax.nn.softmax(z, axis=-1)
            else:
                z = activations[op.name](z)
        z = arrays["biases"][index + 1] + z @ arrays["weights"][index]
    return z


def _make_sample(workload: Workload, specs: dict[str, Any], dtype: Any) -> Any:
    """sample(params, obs, noise, eps) -> actions, to be jitted."""
    import jax
    import jax.numpy as jnp

    steering, steps = workload.steering, workload.num_steps
    draws = steering.num_samples

    def clip(a: Any) -> Any:
        if steering.clip == "none":
            return a
        clipped = jnp.clip(a, -1, 1)
        return a + jax.lax.stop_gradient(clipped - a) if steering.clip == "straight_through" else clipped

    def value(params: Any, a: Any, fixed: Any) -> Any:
        z = fixed + a.astype(dtype) @ params["critic"]["first"]["actions"]
        q = _rest(params["critic"], specs["critic"], z)[..., 0].astype(jnp.float32)
        if steering.aggregation == "min":
            return q.min(0)
        return q.mean(0) if steering.aggregation == "mean" else q.mean(0) - steering.rho * q.std(0)

    def sample(params: Any, obs: Any, noise: Any, eps: Any) -> Any:
        columns = {
            name: arrays["biases"][0] + obs.astype(dtype) @ arrays["first"]["obs"] for name, arrays in params.items()
        }
        if eps is not None:
            columns["critic"] = jnp.repeat(columns["critic"], draws, axis=1)
            eps = eps.reshape(steps, -1, eps.shape[-1])
            eps_first = eps.astype(dtype) @ params["posterior"]["first"]["xbar"]

        def velocity(x: Any, time: Any) -> Any:
            z = columns["flow"] + time + x.astype(dtype) @ params["flow"]["first"]["noisy_actions"]
            return _rest(params["flow"], specs["flow"], z).astype(jnp.float32)

        def objective(x: Any, now: dict[str, Any]) -> tuple[Any, Any]:
            v = velocity(x, now["flow_time"])
            if eps is None:
                return steering.tau * value(params, clip(x + now["remaining"] * v), columns["critic"]).sum(), v
            z = columns["posterior"] + now["posterior_time"]
            z = z + x.astype(dtype) @ params["posterior"]["first"]["noisy_actions"]
            z = jnp.repeat(z, draws, axis=0) + now["eps_first"]
            a = now["eps"] + _rest(params["posterior"], specs["posterior"], z).astype(jnp.float32)
            q = value(params, clip(a), columns["critic"]).reshape(-1, draws)
            return jax.scipy.special.logsumexp(steering.tau * q, axis=1).sum(), jax.lax.stop_gradient(v)

        def step(x: Any, now: dict[str, Any]) -> tuple[Any, None]:
            if steering.jacobian == "identity":
                v = velocity(x, now["flow_time"])
                a = clip(x + now["remaining"] * v)
                g = jax.grad(lambda at: steering.tau * value(params, at, columns["critic"]).sum())(a)
            else:
                g, v = jax.grad(objective, has_aux=True)(x, now)
            scale = steering.alpha
            if steering.scale == "norm_match":
                norm_v, norm_g = (jnp.linalg.norm(u, axis=1, keepdims=True) for u in (v, g))
                scale = steering.alpha * norm_v / (norm_g + steering.eps)
            return x + (v + scale * g) / steps, None

        start = 0 if steering.steer_first_step else 1
        x = noise if start == 0 else noise + velocity(noise, params["flow"]["time"][0]) / steps
        over = {"flow_time": params["flow"]["time"][start:], "remaining": 1 - jnp.arange(start, steps) / steps}
        if eps is not None:
            over |= {
                "posterior_time": params["posterior"]["time"][start:],
                "eps": eps[start:],
                "eps_first": eps_first[start:],
            }
        x, _ = jax.lax.scan(step, x, over)
        return jnp.clip(x, -1, 1)

    return sample


def build_jax(workload: Workload, precision: str) -> Run:
    """JAX: jit, lax.scan over the steered steps, jax.grad with respect to x alone."""
    import jax
    import jax.numpy as jnp

    modules = {"flow": workload.flow, "critic": workload.critic, "posterior": workload.posterior}
    stacked = {
        name: StackedNetwork(module.bound(), workload.num_steps, DTYPES[precision])
        for name, module in modules.items()
        if module is not None
    }
    params = {name: _arrays(network) for name, network in stacked.items()}
    specs = {name: network.spec for name, network in stacked.items()}
    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    sample = jax.jit(_make_sample(workload, specs, dtype))
    inputs = [_array(tensor) for tensor in (workload.obs, workload.noise, workload.posterior_noise)]

    def run() -> Tensor:
        actions = sample(params, *inputs).block_until_ready()
        return torch.from_dlpack(actions)

    return run
