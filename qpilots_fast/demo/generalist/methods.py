"""The ways of steering that are compared, all through the policy's `denoise_step`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...gate import calibrate_gate
from ...integrations import ReversedTimeFlow, lerobot, real_dims
from ...sampler import SteeredSampler
from ...steering import Steering
from .critics import GeneralistCritics
from .policy import ACTION_DIM, CHUNK, PADDED_DIM, GeneralistPolicy
from .tasks import Act, Batch

WEAK_ALPHA, DEFAULT_ALPHA, STRONG_ALPHA = 0.1, 0.2, 0.5
CANDIDATES = 8
DRAWS, GLASS_STEPS = 4, 2
GATE_QUANTILE = 0.75  # of the critics' disagreement on the unsteered policy's observations, above which it is left out


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    name: str
    steering: Steering


def whole_sampler(policy: GeneralistPolicy, critics: GeneralistCritics, steering: Steering) -> SteeredSampler:
    """The policy's flow behind a SteeredSampler, which draws posteriors and tells more; its obs are `cached`."""
    flow = ReversedTimeFlow(
        policy.model, chunk_shape=(CHUNK, PADDED_DIM), call=lambda m, obs, x, tau: m.denoise_step(obs["cache"], x, tau)
    )
    return SteeredSampler(
        flow,
        lambda obs, a: critics(obs["batch"], a.unflatten(1, (CHUNK, PADDED_DIM))[..., :ACTION_DIM]),
        replace(steering, steered_dims=real_dims(CHUNK, PADDED_DIM, ACTION_DIM)),
        num_steps=policy.config.num_inference_steps, action_low=-1.0, action_high=1.0,
    )  # fmt: skip


def cached(policy: GeneralistPolicy, batch: Batch) -> dict[str, Any]:
    """The batch with the prefix's keys and values, which serve all flow steps, candidates and draws."""
    with torch.no_grad():
        cache = policy.model.embed_prefix(batch["observation.state"], batch["observation.language"])
    return {"batch": batch, "cache": cache}


@contextmanager
def steered(policy: GeneralistPolicy, critics: GeneralistCritics, steering: Steering, seed: int = 0) -> Iterator[Act]:
    """What chooses chunks with this steering, as one steers LeRobot's models; posterior draws take a SteeredSampler.

    Args:
        seed: of posterior draws, and of the candidates after the first.
    """
    if steering.draws_posterior:
        sampler = whole_sampler(policy, critics, steering)
        generator = torch.Generator().manual_seed(seed)

        def draw(batch: Batch, noise: Tensor) -> Tensor:
            with torch.no_grad():
                chunk = sampler(cached(policy, batch), noise.flatten(1), generator=generator)
            return chunk.unflatten(1, (CHUNK, PADDED_DIM))[..., :ACTION_DIM]

        yield draw
    elif steering.needs_critic:
        handle = lerobot.steer(policy, critics, steering, action_low=-1.0, action_high=1.0)
        generator = torch.Generator().manual_seed(seed)

        def choose(batch: Batch, noise: Tensor) -> Tensor:
            more = torch.randn(len(noise), steering.num_candidates - 1, *noise.shape[1:], generator=generator)
            return policy.predict_action_chunk(batch, torch.cat([noise.unsqueeze(1), more], 1))

        try:
            yield choose if steering.num_candidates > 1 else policy.predict_action_chunk
        finally:
            handle.remove()
    else:
        yield policy.predict_action_chunk


def _start(rows: int) -> Tensor:
    """Noise of some chunks [B, C D], the same at every call."""
    return torch.randn(rows, CHUNK * PADDED_DIM, generator=torch.Generator().manual_seed(0))


def gated(policy: GeneralistPolicy, critics: GeneralistCritics, batch: Batch, steering: Steering) -> Steering:
    """The steering with a gate at GATE_QUANTILE of the critics' disagreement on these observations."""
    sampler = whole_sampler(policy, critics, steering)
    noise = _start(len(batch["observation.state"]))
    limit = calibrate_gate(sampler, cached(policy, batch), GATE_QUANTILE, noise=noise)
    return replace(steering, max_disagreement=limit)


def matched_weight(policy: GeneralistPolicy, critics: GeneralistCritics, batch: Batch, alpha: float) -> float:
    """QGF's absolute weight whose push on these observations is, in the median, that of U at this alpha.

    The way from noise to action stands for the velocity.
    """
    noise = _start(len(batch["observation.state"]))
    sampler = whole_sampler(policy, critics, Steering.qgf(1e-6))  # as good as unsteered
    actions, info = sampler(cached(policy, batch), noise, return_info=True)
    way = (actions - noise)[:, list(real_dims(CHUNK, PADDED_DIM, ACTION_DIM))].norm(dim=1)
    return float(alpha * way.median() / info.gradient_norms.median())


def methods(policy: GeneralistPolicy, critics: GeneralistCritics, batch: Batch) -> list[Method]:
    """Every row of the table; what has a scale of its own takes it from these observations of the unsteered policy."""
    rows = {
        "unsteered": Steering.unsteered(),
        f"best of {CANDIDATES}": Steering.best_of_n(CANDIDATES, aggregation="pessimistic"),
    }
    for alpha in (WEAK_ALPHA, DEFAULT_ALPHA):
        drawn = Steering.qpilots_m(alpha, num_samples=DRAWS)
        rows |= {
            f"QGF, its push as alpha {alpha:g}": Steering.qgf(matched_weight(policy, critics, batch, alpha)),
            f"QPILOTS-U full, alpha {alpha:g}": Steering.qpilots_u(alpha),
            f"QPILOTS-U identity, alpha {alpha:g}": Steering.qpilots_u(alpha, jacobian="identity"),
            f"QPILOTS-M (GLASS), alpha {alpha:g}, N={DRAWS}": replace(drawn, estimate="glass", glass_steps=GLASS_STEPS),
        }
    weak, strong = Steering.qpilots_u(WEAK_ALPHA), Steering.qpilots_u(STRONG_ALPHA, jacobian="identity")
    rows |= {
        f"QPILOTS-U full, alpha {WEAK_ALPHA:g}, gated": gated(policy, critics, batch, weak),
        f"QPILOTS-U identity, alpha {STRONG_ALPHA:g}": strong,
        f"QPILOTS-U identity, alpha {STRONG_ALPHA:g}, gated": gated(policy, critics, batch, strong),
    }
    return [Method(name, steering) for name, steering in rows.items()]
