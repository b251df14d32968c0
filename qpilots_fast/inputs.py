"""The checks on what a sampler is given, and the noise that a call starts from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .candidates import rotated_starts
from .networks import PackableNetwork
from .steering import Steering


def check_bound(name: str, value: object) -> float:
    """An action bound as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; expected a finite number (actions are scaled to one common box).")
    return float(value)


def check_network(name: str, network: object, needed: bool) -> None:
    """Raises unless the network fits its place."""
    kinds = {"flow": "flow", "critic": "critic", "posterior": "meta_flow_map"}
    if network is None:
        if needed:
            raise ValueError(f"{name} is None, but this steering needs one; give a network or a callable.")
        return
    if isinstance(network, PackableNetwork):
        if network.spec.kind != kinds[name]:
            raise TypeError(
                f"{name} is a {network.spec.kind} network ({type(network).__name__}); expected a {kinds[name]}."
            )
    elif not callable(network):
        raise TypeError(f"{name} is {type(network).__name__}; expected a network or a callable.")


def check_finite(name: str, value: Tensor | None) -> None:
    """Raises ValueError where a CPU tensor has a non-finite value."""
    # a GPU tensor is not looked at: it would stop the stream at every call
    if value is None or value.device.type != "cpu" or math.isfinite(value.sum().item()):
        return  # a finite sum has finite terms; an overflowing one is looked at term by term
    if not bool(torch.isfinite(value).all()):
        bad = (~torch.isfinite(value)).sum().item()
        raise ValueError(f"{name} has {bad} non-finite values; expected finite numbers (check your normalisation).")


def check_all_finite(obs: Any, noise: Tensor, posterior_noise: Tensor | None) -> None:
    """Raises ValueError where anything that a call starts from is not finite."""
    check_finite("noise", noise)
    check_finite("posterior_noise", posterior_noise)
    if isinstance(obs, Tensor) and obs.is_floating_point():
        check_finite("obs", obs)


def check_actions(actions: Tensor) -> None:
    """Raises where an action is not finite: the flow itself returned a non-finite velocity."""
    if actions.device.type == "cpu" and not math.isfinite(actions.sum().item()):  # each is in bounds or NaN
        rows = (~torch.isfinite(actions)).any(-1).nonzero().flatten().tolist()
        raise ValueError(
            f"the flow's velocity is not finite in rows {rows[:8]}{'...' if len(rows) > 8 else ''}; expected finite "
            "velocities (are the flow's weights finite, and obs in the range it was trained on?)."
        )


@dataclass(frozen=True)
class Inputs:
    """What a call starts from: obs as given; noise [B, n, A] of n candidates; posterior_noise [K, B, N, A] or None."""

    obs: Any
    noise: Tensor
    posterior_noise: Tensor | None


def read_inputs(
    obs: Any,
    noise: Tensor | None,
    posterior_noise: Tensor | None,
    generator: torch.Generator | None,
    *,
    steering: Steering,
    num_steps: int,
    packed: PackableNetwork | None,
    device: torch.device,
) -> Inputs:
    """Checks what a sampler was called with, and draws what was not given.

    Args:
        packed: any network that tells S and A. device: the networks'.

    Raises:
        ValueError, TypeError: wrong shapes, dtypes or devices.
    """
    batch_size, device, dtype = _read_batch(obs, noise, packed, device)
    if packed is not None:
        action_dim = packed.spec.action_dim
    elif noise is None:
        raise ValueError("noise is None and no network tells the action width; give noise [B, A].")
    else:
        action_dim = noise.shape[-1]
    start = _start_noise(noise, steering.num_candidates, batch_size, action_dim, device, dtype, generator)
    shape = (num_steps, batch_size, steering.num_samples, action_dim)
    eps = _posterior_noise(posterior_noise, shape, device, dtype, generator) if steering.draws_posterior else None
    return Inputs(obs, start, eps)


def _read_batch(
    obs: Any, noise: Tensor | None, packed: PackableNetwork | None, device: torch.device
) -> tuple[int, torch.device, torch.dtype]:
    """Batch size, device and state dtype of a call; packed is any network that tells S, device is the networks'."""
    if isinstance(obs, Tensor) and packed is not None:
        if obs.ndim != 2 or obs.shape[1] != packed.spec.obs_dim:
            raise ValueError(f"obs has shape {list(obs.shape)}; expected [B, {packed.spec.obs_dim}].")
        if not obs.is_floating_point():
            raise TypeError(f"obs is {obs.dtype}; expected a floating dtype, e.g. obs.float().")
        if obs.device != device:
            raise ValueError(f"obs is on {obs.device}, the networks are on {device}; move one with .to(...).")
    if noise is None:
        if not isinstance(obs, Tensor) or obs.ndim < 1:
            raise ValueError(
                f"noise is None and obs is {type(obs).__name__}, so the batch size is unknown; give noise [B, A]."
            )
        dtype = torch.float64 if obs.dtype == torch.float64 else torch.float32
        return obs.shape[0], obs.device, dtype
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        raise TypeError(f"noise is {getattr(noise, 'dtype', type(noise).__name__)}; expected a floating Tensor.")
    if isinstance(obs, Tensor):
        if packed is not None and noise.shape[:1] != obs.shape[:1]:
            raise ValueError(f"noise has {noise.shape[0]} rows, obs {obs.shape[0]}; expected the same.")
        if noise.device != obs.device:
            raise ValueError(f"noise is on {noise.device}, obs on {obs.device}; expected one device.")
    wide = noise.dtype == torch.float64 or (isinstance(obs, Tensor) and obs.dtype == torch.float64)
    return noise.shape[0], noise.device, torch.float64 if wide else torch.float32


def _start_noise(
    noise: Tensor | None,
    count: int,
    batch_size: int,
    action_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator | None,
) -> Tensor:
    """The flow's start [B, n, A] for count = n candidates."""
    if noise is None:
        return torch.randn(batch_size, count, action_dim, device=device, dtype=dtype, generator=generator)
    if tuple(noise.shape) == (batch_size, action_dim):
        return rotated_starts(noise.to(dtype), count)
    if count > 1 and tuple(noise.shape) == (batch_size, count, action_dim):
        return noise.to(dtype)
    also = f" or [{batch_size}, {count}, {action_dim}]" if count > 1 else ""
    raise ValueError(f"noise has shape {list(noise.shape)}; expected [{batch_size}, {action_dim}]{also}.")


def _posterior_noise(
    eps: Tensor | None,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator | None,
) -> Tensor:
    """The draws' noise [K, B, N, A]."""
    if eps is None:
        return torch.randn(shape, device=device, dtype=dtype, generator=generator)
    if not isinstance(eps, Tensor) or not eps.is_floating_point():
        raise TypeError(f"posterior_noise is {getattr(eps, 'dtype', type(eps).__name__)}; expected a floating Tensor.")
    if tuple(eps.shape) != shape:
        raise ValueError(f"posterior_noise has shape {list(eps.shape)}; expected {list(shape)} ([K, B, N, A]).")
    if eps.device != device:
        raise ValueError(f"posterior_noise is on {eps.device}, noise on {device}; expected one device.")
    return eps.to(dtype)
