"""Training objectives: flow matching for the policy; steered TD, SARSA and IQL for the critics.

Each returns losses to call `.backward()` on; targets carry no gradient. Discounts are given per transition, so that
action chunks (gamma^C) and terminations (0) need no flags.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .callables import CriticList, is_list
from .critic_outputs import ask_critic
from .heads import Head
from .loop_conventions import check_time
from .meta_flow_map import meta_flow_map_loss as meta_flow_map_loss
from .networks import PackableNetwork
from .reference import aggregate
from .steering import AGGREGATIONS

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
Critic = Callable[[Tensor, Tensor], Any]
Sampler = Callable[[Tensor], Tensor]


class IQLLosses(NamedTuple):
    """The two losses of `iql_loss`; they share no parameter, so their sum may be minimised by one optimiser."""

    critic: Tensor
    value: Tensor


def _check_rows(owner: str, obs: Tensor, **others: Tensor) -> None:
    if isinstance(obs, Tensor) and obs.shape[:1] == (0,):
        raise ValueError(f"{owner}: obs has shape {tuple(obs.shape)}, no rows; a mean over them would be NaN.")
    for name, tensor in others.items():
        if tensor.shape[:1] != obs.shape[:1]:
            raise ValueError(
                f"{owner}: {name} has shape {tuple(tensor.shape)} beside obs {tuple(obs.shape)}; expected the same "
                "number of rows."
            )


def _as_vector(owner: str, name: str, values: Tensor, obs: Tensor) -> Tensor:
    """[B] of [B] or a column [B, 1], which would broadcast to [B, B]."""
    rows = obs.shape[0]
    if not isinstance(values, Tensor):
        raise TypeError(f"{owner}: {name} is {type(values).__name__}; expected a Tensor [{rows}].")
    if tuple(values.shape) not in ((rows,), (rows, 1)):
        raise ValueError(
            f"{owner}: {name} has shape {tuple(values.shape)}; expected ({rows},) or ({rows}, 1), one number per row "
            "of obs."
        )
    return values.reshape(rows)


def _read_rewards(owner: str, obs: Tensor, rewards: Tensor, discounts: Tensor) -> tuple[Tensor, Tensor]:
    rewards, discounts = _as_vector(owner, "rewards", rewards, obs), _as_vector(owner, "discounts", discounts, obs)
    if not discounts.is_floating_point():
        raise TypeError(
            f"{owner}: discounts is {discounts.dtype}, which looks like dones; expected floating numbers, "
            "discount = gamma * (1 - done): discounts=gamma * (1 - dones.float())."
        )
    return rewards if rewards.is_floating_point() else rewards.to(discounts.dtype), discounts


def _asked(critic: Any, actions: Tensor) -> tuple[Critic, Tensor]:
    """Several critics as one, and a chunk [B, C, D] flat where a packed critic reads it."""
    if isinstance(critic, (list, tuple)) or is_list(critic):
        critic = CriticList(critic)
    return critic, actions.flatten(1) if isinstance(critic, PackableNetwork) and actions.ndim == 3 else actions


def _check_aggregation(owner: str, aggregation: str, rho: float) -> None:
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"{owner}: aggregation is {aggregation!r}; expected one of {', '.join(AGGREGATIONS)}.")
    if not rho >= 0:
        raise ValueError(f"{owner}: rho is {rho!r}; expected a number >= 0.")


def flow_matching_loss(
    flow: Velocity, obs: Tensor, actions: Tensor, *, noise: Tensor | None = None, t: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """mean || v(obs, x_t, t) - (x1 - e) ||^2 with x_t = t x1 + (1 - t) e, t ~ U(0, 1), e ~ N(0, I).

    Args:
        flow: (obs [B, S], noisy_actions [B, A], t [B, 1]) -> velocity [B, A].
        obs: [B, S].
        actions: x1 [B, A], or chunks [B, C, D] for a flow that takes them, in the sampler's bounds.
        noise: e, as actions, drawn where None.
        t: [B, 1] or [B] in [0, 1], drawn where None.
        generator: of the draws.

    Returns:
        A scalar: the mean over rows and action dimensions.

    Raises:
        ValueError: for shapes that do not fit, and t outside [0, 1].
    """
    if isinstance(obs, Tensor):
        _check_rows("flow_matching_loss", obs, actions=actions)
    if noise is None:
        noise = torch.randn(actions.shape, generator=generator, dtype=actions.dtype, device=actions.device)
    if t is None:
        t = torch.rand(actions.shape[0], 1, generator=generator, dtype=actions.dtype, device=actions.device)
    t = _as_vector("flow_matching_loss", "t", t, actions).unsqueeze(1)
    check_time("flow_matching_loss", t)
    at = t.reshape(-1, *(1,) * (actions.ndim - 1))  # one time a row, whatever an action's shape
    velocity = flow(obs, at * actions + (1 - at) * noise, t)
    for name, value in (("noise", noise), ("the flow's velocity", velocity)):
        if value.shape != actions.shape:
            raise ValueError(
                f"flow_matching_loss: {name} has shape {tuple(value.shape)}; expected {tuple(actions.shape)}."
            )
    return (velocity - (actions - noise)).square().mean()


@torch.no_grad()
def td_target(
    target_critic: Critic, rewards: Tensor, discounts: Tensor, next_obs: Tensor, next_actions: Tensor, *,
    aggregation: str = "pessimistic", rho: float = 0.5, critic_layout: str = "auto", head: Head | None = None,
) -> Tensor:  # fmt: skip
    """rewards + discounts * Qbar(next_obs, next_actions), Qbar = mean_j Q_j - rho std_j Q_j (population std).

    Args:
        target_critic: (obs [B, S], actions [B, A]) -> q_values [E, B], or [B, E], [B, 1], [B], [E, B, 1], or a list or
            tuple of these; usually a slow copy of the critic.
        rewards: [B] or [B, 1]; for a chunk of C steps sum_i gamma^i r_i.
        discounts: [B] or [B, 1], floating; for a chunk gamma^C, and 0 after a termination: gamma * (1 - dones.float()).
        next_obs: [B, S].
        next_actions: [B, A].
        aggregation: "pessimistic" (QPILOTS), "mean", or "min" (QGF).
        rho: pessimism, >= 0, in standard deviations.
        critic_layout: as SteeredSampler's; settles an output [B, B].
        head: `heads.C51` or `heads.HLGauss`, where the critic returns logits over returns.

    Returns:
        [B], without gradient; with a head the target's probabilities [B, M].

    Raises:
        ValueError, TypeError: for shapes that do not fit, and for discounts that are bool or integer (dones).
    """
    _check_aggregation("td_target", aggregation, rho)
    _check_rows("td_target", next_obs, next_actions=next_actions)
    rewards, discounts = _read_rewards("td_target", next_obs, rewards, discounts)
    target_critic, next_actions = _asked(target_critic, next_actions)
    if head is not None:
        logits = head.read(target_critic(next_obs, next_actions), len(next_obs), "target_critic")
        return head.bootstrapped(logits, rewards, discounts, aggregation, rho)
    next_q = aggregate(
        ask_critic(target_critic, next_obs, next_actions, critic_layout, "target_critic"), aggregation, rho
    )
    return rewards + discounts * next_q.to(rewards.dtype)


def td_loss(
    critic: Critic, target_critic: Critic, obs: Tensor, actions: Tensor, rewards: Tensor, discounts: Tensor,
    next_obs: Tensor, *, sampler: Sampler | None = None, next_actions: Tensor | None = None,
    aggregation: str = "pessimistic", rho: float = 0.5, critic_layout: str = "auto", head: Head | None = None,
) -> Tensor:  # fmt: skip
    """mean_j,b (Q_j(obs, actions) - [rewards + discounts * Qbar'(next_obs, next_actions)])^2.

    With `sampler`, a SteeredSampler over the same critics, the next action is the one that the steered policy would
    take (QPILOTS, arXiv 2606.14801: policy improvement inside the target). With `next_actions` from the data it is
    SARSA: the value of the policy that made the data.

    Args:
        critic: (obs [B, S], actions [B, A]) -> q_values, laid out as `td_target` reads them; gradients flow here only.
        target_critic: the same signature; usually a slow copy.
        obs: [B, S].
        actions: [B, A].
        rewards: [B] or [B, 1], see `td_target`.
        discounts: [B] or [B, 1], see `td_target`.
        next_obs: [B, S].
        sampler: next_obs -> next actions [B, A]; called without gradient.
        next_actions: [B, A]; exactly one of sampler and next_actions is given.
        aggregation: of the target ensemble, as `td_target`'s.
        rho: of the target ensemble.
        critic_layout: of both critics, as SteeredSampler's.
        head: `heads.C51` or `heads.HLGauss`, where both critics return logits over returns ([E, B, M], [B, M] or a
            list of these): the loss is then the cross-entropy. A sampler over such critics takes their values,
            as_critic(critic, call=lambda m, obs, a: head.values(m(obs, a))).

    Returns:
        A scalar: the mean over members and rows.

    Raises:
        ValueError: for both or neither of sampler and next_actions, or shapes that do not fit.
        TypeError: for discounts that are bool or integer (dones).
    """
    if (sampler is None) == (next_actions is None):
        given = "both" if sampler is not None else "neither"
        raise ValueError(
            f"td_loss: got {given} of sampler and next_actions; expected exactly one (steered TD or SARSA)."
        )
    _check_rows("td_loss", obs, actions=actions, next_obs=next_obs)
    if sampler is not None:
        with torch.no_grad():
            next_actions = sampler(next_obs)
    assert next_actions is not None
    target = td_target(
        target_critic, rewards, discounts, next_obs, next_actions, aggregation=aggregation, rho=rho,
        critic_layout=critic_layout, head=head,
    )  # fmt: skip
    return _regression(critic, obs, actions, target, critic_layout, head)


def _regression(
    critic: Critic, obs: Tensor, actions: Tensor, target: Tensor, critic_layout: str, head: Head | None
) -> Tensor:
    """The mean over members and rows of the square to the target [B], or the cross-entropy to its probabilities."""
    critic, actions = _asked(critic, actions)
    if head is not None:
        return head.loss(head.read(critic(obs, actions), len(obs)), target)
    return (ask_critic(critic, obs, actions, critic_layout) - target).square().mean()


def iql_loss(
    critic: Critic, target_critic: Critic, value: Callable[[Tensor], Tensor], obs: Tensor, actions: Tensor,
    rewards: Tensor, discounts: Tensor, next_obs: Tensor, *, expectile: float = 0.9,
    aggregation: str = "pessimistic", rho: float = 0.5, critic_layout: str = "auto", head: Head | None = None,
) -> IQLLosses:  # fmt: skip
    """Implicit Q-learning (arXiv 2110.06169): an upper expectile of Qbar over the data's actions stands for the max.

        value:  mean_b |expectile - 1[u < 0]| u^2,  u = Qbar'(obs, actions) - V(obs)
        critic: mean_j,b (Q_j(obs, actions) - [rewards + discounts * V(next_obs)])^2

    No action is sampled, so training costs no sampler call (QGF trains its critics this way).

    Args:
        critic: (obs [B, S], actions [B, A]) -> q_values, laid out as `td_target` reads them.
        target_critic: the same signature; usually a slow copy.
        value: obs [B, S] -> [B] (or [B, 1]).
        obs: [B, S].
        actions: [B, A].
        rewards: [B] or [B, 1], see `td_target`.
        discounts: [B] or [B, 1], see `td_target`.
        next_obs: [B, S].
        expectile: in (0, 1); 0.5 is the mean (SARSA), towards 1 the best action in the data.
        aggregation: of the target ensemble under the value, as `td_target`'s.
        rho: of the same.
        critic_layout: of both critics, as SteeredSampler's.
        head: as `td_loss`'s; the critics' loss is then the cross-entropy to head.target of the same target.

    Returns:
        Two scalars; V's target and the critics' target carry no gradient.

    Raises:
        ValueError: for an expectile outside (0, 1) or shapes that do not fit.
        TypeError: for discounts that are bool or integer (dones).
    """
    if not 0 < expectile < 1:
        raise ValueError(f"iql_loss: expectile is {expectile!r}; expected a number in (0, 1).")
    _check_aggregation("iql_loss", aggregation, rho)
    _check_rows("iql_loss", obs, actions=actions, next_obs=next_obs)
    rewards, discounts = _read_rewards("iql_loss", obs, rewards, discounts)
    with torch.no_grad():
        target_critic, flat = _asked(target_critic, actions)
        if head is None:
            q_values = ask_critic(target_critic, obs, flat, critic_layout, "target_critic")
        else:
            q_values = head.values(head.read(target_critic(obs, flat), len(obs), "target_critic"))
        q = aggregate(q_values, aggregation, rho)
        next_value = _as_vector("iql_loss", "value(next_obs)", value(next_obs), obs)
        target = rewards + discounts * next_value.to(rewards.dtype)
        target = target if head is None else head.target(target)
    advantage = q - _as_vector("iql_loss", "value(obs)", value(obs), obs)
    weight = torch.where(advantage < 0, 1 - expectile, expectile)
    value_loss = (weight * advantage.square()).mean()
    return IQLLosses(_regression(critic, obs, actions, target, critic_layout, head), value_loss)


@torch.no_grad()
def polyak_update(target: torch.nn.Module, source: torch.nn.Module, rate: float = 0.005) -> None:
    """target <- (1 - rate) target + rate source, parameter by parameter, in place.

    Args:
        target: the slow copy.
        source: of the same structure.
        rate: in [0, 1].

    Raises:
        ValueError: where the two have not equally many parameters.
    """
    for slow, fast in zip(target.parameters(), source.parameters(), strict=True):
        slow.lerp_(fast, rate)
