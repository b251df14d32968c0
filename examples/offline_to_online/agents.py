"""The methods: steered samplers over one behaviour-cloned flow, one-step distillation, and backpropagation in time."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from qpilots_fast import CriticEnsemble, FlowMLP, MetaFlowMap, SteeredSampler, Steering
from qpilots_fast.objectives import flow_matching_loss, meta_flow_map_loss, polyak_update, td_loss
from qpilots_fast.reference import aggregate

from .config import Config
from .tasks import Batch


def steering_of(config: Config) -> Steering:
    """The sampler's settings of each method; fql and fbrac sample their base flow unsteered."""
    settings = {
        "qpilots_u": Steering.qpilots_u(config.alpha, config.rho),
        "qpilots_m": Steering.qpilots_m(config.alpha, config.rho, config.num_samples),
        "qgf": Steering.qgf(config.alpha),
        "best_of_n": replace(Steering.best_of_n(config.candidates, "pessimistic"), rho=config.rho),
    }
    return settings.get(config.method, Steering.unsteered())


class Agent:
    """A behaviour-cloned flow and pessimistic critics whose TD target takes the method's own next action.

    Its networks are in `networks`, their optimisers in `optimisers`; `update` makes one step of each.
    """

    def __init__(self, config: Config, obs_dim: int, action_dim: int) -> None:
        self.config = config
        hidden = (config.hidden_dim,) * config.hidden_layers
        self.generator = torch.Generator().manual_seed(config.seed)
        torch.manual_seed(config.seed)
        self.flow = FlowMLP(obs_dim, action_dim, hidden)
        self.critic = CriticEnsemble(obs_dim, action_dim, config.num_critics, hidden)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.networks: dict[str, nn.Module] = {"flow": self.flow, "critic": self.critic, "target": self.target}
        self.posterior: MetaFlowMap | None = None
        self.slow_posterior: MetaFlowMap | None = None
        if config.method == "qpilots_m":
            self.posterior = MetaFlowMap(obs_dim, action_dim, hidden, time_embedding="fourier", time_embedding_dim=16)
            self.slow_posterior = copy.deepcopy(self.posterior).requires_grad_(False)
            self.networks |= {"posterior": self.posterior, "slow_posterior": self.slow_posterior}
        # the slow critics steer: they are also the ones that judge the action
        self.sampler = SteeredSampler(
            self.flow, self.target, steering_of(config), posterior=self.slow_posterior, num_steps=config.num_steps,
            backend=config.backend, precision=config.precision,
        )  # fmt: skip
        self.optimisers: dict[str, torch.optim.Optimizer] = {}
        for name in ("flow", "critic", "posterior"):
            self._optimise(name)

    def _optimise(self, name: str) -> None:
        if name in self.networks:
            self.optimisers[name] = torch.optim.Adam(self.networks[name].parameters(), self.config.learning_rate)

    def act(self, obs: Tensor) -> Tensor:
        """Actions [B, A] at obs [B, S]."""
        return self.sampler(obs, generator=self.generator)

    def _step(self, name: str, loss: Tensor) -> None:
        self.optimisers[name].zero_grad(set_to_none=True)
        loss.backward()
        self.optimisers[name].step()

    def update(self, batch: Batch) -> dict[str, float]:
        """One gradient step of everything; returns what to log."""
        logs = self.update_policy(batch)
        if self.config.method != "bc":
            loss = td_loss(
                self.critic, self.target, batch.obs, batch.actions, batch.rewards, batch.discounts, batch.next_obs,
                sampler=self.act, rho=self.config.rho,
            )  # fmt: skip
            self._step("critic", loss)
            polyak_update(self.target, self.critic, self.config.polyak)
            logs["critic_loss"] = float(loss.detach())
        return logs

    def update_policy(self, batch: Batch) -> dict[str, float]:
        """Behaviour cloning of the flow, and for QPILOTS-M distillation of its posterior."""
        loss = flow_matching_loss(self.flow, batch.obs, batch.actions, generator=self.generator)
        self._step("flow", loss)
        logs = {"flow_loss": float(loss.detach())}
        if self.posterior is not None:
            assert self.slow_posterior is not None
            loss = meta_flow_map_loss(
                self.posterior, self.flow, batch.obs, batch.actions, generator=self.generator
            )  # fmt: skip
            self._step("posterior", loss)
            polyak_update(self.slow_posterior, self.posterior, self.config.posterior_polyak)
            logs["posterior_loss"] = float(loss.detach())
        return logs

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal, of the agent's own generator."""
        return torch.randn(like.shape, generator=self.generator)

    def normalised_value(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Mean of Qbar over the batch, divided by the batch's mean |Qbar|."""
        q = aggregate(self.critic(obs, actions), "pessimistic", self.config.rho)
        return q.mean() / q.detach().abs().mean().clamp(min=1e-6)


class OneStepAgent(Agent):
    """Distils the flow into a one-step policy that also climbs the critic (the family of FQL, arXiv 2502.02538)."""

    def __init__(self, config: Config, obs_dim: int, action_dim: int) -> None:
        super().__init__(config, obs_dim, action_dim)
        self.student = FlowMLP(obs_dim, action_dim, (config.hidden_dim,) * config.hidden_layers)
        self.networks["student"] = self.student
        self._optimise("student")

    def _student(self, obs: Tensor, noise: Tensor) -> Tensor:
        return self.student(obs, noise, 0.0)  # the time column is unused

    def act(self, obs: Tensor) -> Tensor:
        noise = torch.randn(len(obs), self.flow.spec.action_dim, generator=self.generator)
        with torch.no_grad():
            return self._student(obs, noise).clamp(-1, 1)

    def update_policy(self, batch: Batch) -> dict[str, float]:
        logs = super().update_policy(batch)
        noise = self.noise(batch.actions)
        teacher = self.sampler(batch.obs, noise)
        actions = self._student(batch.obs, noise)
        distillation = (actions - teacher).square().mean()
        value = self.normalised_value(batch.obs, actions.clamp(-1, 1))
        self._step("student", self.config.distill_weight * distillation - value)
        return logs | {"distillation_loss": float(distillation.detach())}


class BackpropagationAgent(Agent):
    """Trains the flow through all of its K Euler steps, beside behaviour cloning (the family of FBRAC)."""

    def update_policy(self, batch: Batch) -> dict[str, float]:
        cloning = flow_matching_loss(self.flow, batch.obs, batch.actions, generator=self.generator)
        x, count = self.noise(batch.actions), self.config.num_steps
        for k in range(count):
            x = x + self.flow(batch.obs, x, k / count) / count
        value = self.normalised_value(batch.obs, x.clamp(-1, 1))
        self._step("flow", cloning - self.config.value_weight * value)
        return {"flow_loss": float(cloning.detach()), "policy_value": float(value.detach())}


def make_agent(config: Config, obs_dim: int, action_dim: int) -> Agent:
    """The agent of config.method."""
    kinds = {"fql": OneStepAgent, "fbrac": BackpropagationAgent}
    return kinds.get(config.method, Agent)(config, obs_dim, action_dim)
