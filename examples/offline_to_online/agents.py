"""The methods: steered samplers over one behaviour-cloned flow, one-step distillation, and backpropagation in time."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qpilots_fast import CriticEnsemble, FlowMLP, MetaFlowMap, SteeredSampler, Steering, ops
from qpilots_fast.objectives import flow_matching_loss, meta_flow_map_loss, polyak_update, td_target
from qpilots_fast.reference import aggregate

from .config import Config
from .pretrain import load_pretrained, new_flow, new_posterior
from .tasks import Batch


def steering_of(config: Config, method: str) -> Steering:
    """The sampler's settings of each method; fql and fbrac sample their base flow unsteered."""
    settings = {
        "qpilots_u": Steering.qpilots_u(config.alpha, config.rho),
        "qpilots_m": Steering.qpilots_m(config.alpha, config.rho, config.num_samples),
        "qgf": Steering.qgf(config.alpha),
        "best_of_n": replace(Steering.best_of_n(config.candidates, "pessimistic"), rho=config.rho),
    }
    steering = settings.get(method, Steering.unsteered())
    return replace(steering, **json.loads(config.steering)) if method == config.method else steering


class Agent:
    """A behaviour-cloned flow and pessimistic critics whose TD target takes the method's own next action.

    Its networks are in `networks`, their optimisers in `optimisers`; `update` makes one step of each. With
    config.pretrained the flow and the posterior come from that file and have no optimiser.
    """

    trains_flow = False  # whether the method changes a pretrained flow

    def __init__(self, config: Config, obs_dim: int, action_dim: int) -> None:
        self.config = config
        self.generator = torch.Generator().manual_seed(config.seed)
        torch.manual_seed(config.seed)
        self.flow = new_flow(config, obs_dim, action_dim)
        self.critic = CriticEnsemble(obs_dim, action_dim, config.num_critics, config.critic_hidden)
        nn.init.constant_(self.critic.biases[-1], config.initial_value)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.networks: dict[str, nn.Module] = {"flow": self.flow, "critic": self.critic, "target": self.target}
        self.posterior: MetaFlowMap | None = None
        self.slow_posterior: MetaFlowMap | None = None
        if "qpilots_m" in (config.method, config.target):
            self.posterior = new_posterior(config, obs_dim, action_dim)
        pretrained: dict[str, nn.Module] = {"flow": self.flow}
        if self.posterior is not None:
            pretrained["posterior"] = self.posterior
        if config.pretrained is not None:
            load_pretrained(config.pretrained, pretrained)
        if self.posterior is not None:
            self.slow_posterior = copy.deepcopy(self.posterior).requires_grad_(False)
            self.networks |= {"posterior": self.posterior, "slow_posterior": self.slow_posterior}
        # the slow critics steer: they are also the ones that judge the action
        self.sampler = self._sampler(config.method)
        self.target_sampler = self._sampler(config.target) if config.target else None
        self._regression = self._compiled(self._critic_loss)
        self.optimisers: dict[str, torch.optim.Optimizer] = {}
        for name in ("flow", "critic", "posterior"):
            self._optimise(name)
        if config.pretrained is not None:
            self.freeze(*(name for name in pretrained if not (self.trains_flow and name == "flow")))

    def _sampler(self, method: str) -> SteeredSampler:
        return SteeredSampler(
            self.flow, self.target, steering_of(self.config, method), posterior=self.slow_posterior,
            num_steps=self.config.num_steps, backend=self.config.backend, precision=self.config.precision,
            action_low=-1.0, action_high=1.0,
        )  # fmt: skip

    def freeze(self, *names: str) -> None:
        """Leaves these networks as they are from now on."""
        for name in names:
            if self.optimisers.pop(name, None) is not None:
                self.networks[name].requires_grad_(False)

    @property
    def learns(self) -> bool:
        """Whether `update` changes anything: not for bc over a pretrained flow."""
        return self.config.method != "bc" or "flow" in self.optimisers

    def _optimise(self, name: str) -> None:
        if name in self.networks:
            self.optimisers[name] = torch.optim.Adam(
                self.networks[name].parameters(), self.config.learning_rate, fused=True
            )

    def act(self, obs: Tensor) -> Tensor:
        """Actions [B, A] at obs [B, S]."""
        return self.sampler(obs, generator=self.generator)

    def next_actions(self, obs: Tensor) -> Tensor:
        """Actions [B, A] that the TD target values at obs [B, S]."""
        sampler = self.target_sampler
        return self.act(obs) if sampler is None else sampler(obs, generator=self.generator)

    def _step(self, name: str, loss: Tensor) -> None:
        self.optimisers[name].zero_grad(set_to_none=True)
        loss.backward()
        self.optimisers[name].step()

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step of everything; returns what to log."""
        logs = self.update_policy(batch)
        if self.config.method != "bc":
            with torch.no_grad():
                target = td_target(
                    self._target_values, batch.rewards, batch.discounts, batch.next_obs,
                    self.next_actions(batch.next_obs), rho=self.config.rho,
                )  # fmt: skip
            loss = self._regression(batch.obs, batch.actions, target)
            self._step("critic", loss)
            polyak_update(self.target, self.critic, self.config.polyak)
            logs |= {"critic_loss": loss.detach(), "target_mean": target.mean()}
        return logs

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function) if self.config.compile else function

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.config.autocast)

    def _target_values(self, obs: Tensor, actions: Tensor) -> Tensor:
        return ops.critic_values(obs, actions, self.target, backend=self.config.backend)

    def _critic_loss(self, obs: Tensor, actions: Tensor, target: Tensor) -> Tensor:
        """Regression of all members on the TD target: td_loss, its target already at hand."""
        with self._autocast():
            q = self.critic(obs, actions)
        return (q.float() - target).square().mean()

    def update_policy(self, batch: Batch) -> dict[str, Tensor]:
        """Behaviour cloning of the flow, and for QPILOTS-M distillation of its posterior, where they are not frozen."""
        logs = {}
        if "flow" in self.optimisers:
            loss = flow_matching_loss(self.flow, batch.obs, batch.actions, generator=self.generator)
            self._step("flow", loss)
            logs["flow_loss"] = loss.detach()
        if "posterior" in self.optimisers:
            assert self.posterior is not None and self.slow_posterior is not None
            loss = meta_flow_map_loss(self.posterior, self.flow, batch.obs, batch.actions, generator=self.generator)
            self._step("posterior", loss)
            polyak_update(self.slow_posterior, self.posterior, self.config.posterior_polyak)
            logs["posterior_loss"] = loss.detach()
        return logs

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal, of the agent's own generator."""
        return torch.randn(like.shape, generator=self.generator)

    @contextmanager
    def _fixed_critic(self) -> Iterator[None]:
        """Gradients of the actions alone."""
        self.critic.requires_grad_(False)
        yield
        self.critic.requires_grad_(True)

    def normalised_value(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Mean of Qbar over the batch, divided by the batch's mean |Qbar|."""
        q = aggregate(self.critic(obs, actions).float(), "pessimistic", self.config.rho)
        return q.mean() / q.detach().abs().mean().clamp(min=1e-6)


class OneStepAgent(Agent):
    """Distils the flow into a one-step policy that also climbs the critic (the family of FQL, arXiv 2502.02538)."""

    def __init__(self, config: Config, obs_dim: int, action_dim: int) -> None:
        super().__init__(config, obs_dim, action_dim)
        self.student = FlowMLP(obs_dim, action_dim, (config.hidden_dim,) * config.hidden_layers)
        self.networks["student"] = self.student
        self._optimise("student")
        self._student_losses = self._compiled(self._losses)

    def _student(self, obs: Tensor, noise: Tensor) -> Tensor:
        return self.student(obs, noise, 0.0)  # the time column is unused

    def act(self, obs: Tensor) -> Tensor:
        noise = torch.randn(len(obs), self.flow.spec.action_dim, generator=self.generator)
        with torch.no_grad():
            return self._student(obs, noise).clamp(-1, 1)

    def update_policy(self, batch: Batch) -> dict[str, Tensor]:
        logs = super().update_policy(batch)
        noise = self.noise(batch.actions)
        teacher = self.sampler(batch.obs, noise)
        with self._fixed_critic():
            distillation, value = self._student_losses(batch.obs, noise, teacher)
        self._step("student", self.config.distill_weight * distillation - value)
        return logs | {"distillation_loss": distillation.detach(), "policy_value": value.detach()}

    def _losses(self, obs: Tensor, noise: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        with self._autocast():
            actions = self._student(obs, noise).float()
            value = self.normalised_value(obs, actions.clamp(-1, 1))
        return (actions - teacher).square().mean(), value


class BackpropagationAgent(Agent):
    """Trains the flow through all of its K Euler steps, beside behaviour cloning (the family of FBRAC)."""

    trains_flow = True

    def __init__(self, config: Config, obs_dim: int, action_dim: int) -> None:
        super().__init__(config, obs_dim, action_dim)
        self._flow_losses = self._compiled(self._losses)

    def _losses(self, obs: Tensor, data: Tensor, noise: Tensor, t: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        with self._autocast():
            cloning = flow_matching_loss(self.flow, obs, data, noise=noise, t=t)
            x, count = start, self.config.num_steps
            for k in range(count):
                x = x + self.flow(obs, x, torch.full_like(t, k / count)).float() / count
            value = self.normalised_value(obs, x.clamp(-1, 1))
        return cloning, value

    def update_policy(self, batch: Batch) -> dict[str, Tensor]:
        noise, start = self.noise(batch.actions), self.noise(batch.actions)
        t = torch.rand(len(noise), 1, generator=self.generator)
        with self._fixed_critic():
            cloning, value = self._flow_losses(batch.obs, batch.actions, noise, t, start)
        self._step("flow", cloning - self.config.value_weight * value)
        return {"flow_loss": cloning.detach(), "policy_value": value.detach()}


def make_agent(config: Config, obs_dim: int, action_dim: int) -> Agent:
    """The agent of config.method."""
    kinds = {"fql": OneStepAgent, "fbrac": BackpropagationAgent}
    return kinds.get(config.method, Agent)(config, obs_dim, action_dim)
