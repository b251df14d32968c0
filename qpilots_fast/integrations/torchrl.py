"""TorchRL: a sampler as a policy of collectors and environments, and TorchRL's networks as flow and critic."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictParams, dispatch
from torch import Tensor, nn

from ..callables import as_critic
from ..sampler import SteeredSampler
from .diffusion import DiffusionVelocity, GaussianPath


class SteeredPolicy(TensorDictModuleBase):
    """A SteeredSampler as a TensorDictModule: observation in, steered action out.

    Goes where TorchRL takes a policy: `env.rollout(20, policy)`, collectors, modules in sequence. One environment
    ([S] -> [A]) or many ([N, S] -> [N, A]), any batch size. The sampler follows its networks' weights.

    Args:
        sampler: a SteeredSampler; registered as `.sampler`.
        in_keys: the observation's key, and that of the noise to start from; the noise is optional, in in_keys and in a
            tensordict: where there is none, it is drawn. Observation and noise are as in a call of the sampler.
        out_keys: the action's key.

    Raises:
        TypeError, ValueError: for another sampler, or other numbers of keys; in a call KeyError where the observation's
            key is missing.

    Example:
        ```python
        collector = Collector(env, SteeredPolicy(sampler), frames_per_batch=200, total_frames=10_000)
        ```
    """

    def __init__(
        self,
        sampler: SteeredSampler,
        in_keys: Sequence[Any] = ("observation", "noise"),
        out_keys: Sequence[Any] = ("action",),
    ) -> None:
        super().__init__()
        if not isinstance(sampler, SteeredSampler):
            raise TypeError(f"SteeredPolicy: sampler is {type(sampler).__name__}; expected a SteeredSampler.")
        if isinstance(in_keys, str) or len(in_keys) not in (1, 2):
            raise ValueError(f"SteeredPolicy: in_keys is {in_keys!r}; expected [observation] or [observation, noise].")
        if isinstance(out_keys, str) or len(out_keys) != 1:
            raise ValueError(f"SteeredPolicy: out_keys is {out_keys!r}; expected [action].")
        self.sampler = sampler
        self.in_keys, self.out_keys = list(in_keys), list(out_keys)

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the action beside what is there."""
        observation = tensordict.get(self.in_keys[0], None)
        if observation is None:
            has = ", ".join(map(repr, tensordict.keys(True)))
            raise KeyError(
                f"SteeredPolicy: the tensordict has no {self.in_keys[0]!r} (it has {has}); "
                "give in_keys=[...] with the observation's key."
            )
        noise = tensordict.get(self.in_keys[1], None) if len(self.in_keys) == 2 else None
        return tensordict.set(self.out_keys[0], self.sampler(observation, noise))


# ---------------------------------------------------------------- TorchRL's networks


@dataclass(frozen=True)
class TorchRLNetworks:
    """flow and critic as SteeredSampler takes them; they share the parameters of what they were made from."""

    flow: Any
    critic: Any


def from_torchrl(policy_or_loss: Any, critic: Any = None) -> TorchRLNetworks:
    """flow and critic of TorchRL modules and losses; parameters stay shared, so training is seen at the next call.

    Args:
        policy_or_loss: what holds the flow: a TensorDictModule of (observation, noisy action, time) -> velocity,
            DiffusionActor (as DiffusionVelocity: its noise table, steps at SteeredSampler's times), or a loss module
            with such an `actor_network`.
        critic: what holds the critic: a TensorDictModule of an observation and an action (ValueOperator), a list of
            them, or a loss module with a `qvalue_network` or such a `value_network`, whose stacked parameters are the
            ensemble. None: that of policy_or_loss where it is a loss module that has one.

    Returns:
        an object with `flow` and `critic` (None where there is none).

    Raises:
        TypeError: for what holds no flow, or no critic.
    """
    flow = _flow(policy_or_loss)
    found = _critic(policy_or_loss, optional=True) if critic is None else _critic(critic)
    if isinstance(flow, DiffusionVelocity) and isinstance(found, nn.Module):
        found = _with_widths(found, flow)
    return TorchRLNetworks(flow, found)


def _flow(given: Any) -> Any:
    params = None
    if hasattr(given, "actor_network"):
        given, params = given.actor_network, given.actor_network_params
    inner: Any = getattr(given, "module", None)
    if hasattr(inner, "score_network") and hasattr(inner, "alphas_cumprod"):
        table = inner.alphas_cumprod if params is None else params.get(("module", "alphas_cumprod"))
        return DiffusionVelocity(_ScoreNetwork(given, params), GaussianPath.from_alphas_cumprod(table.detach().cpu()))
    keys = getattr(given, "in_keys", None)
    if not isinstance(inner, nn.Module) or keys is None or len(keys) != 3:
        raise TypeError(
            f"from_torchrl: {type(given).__name__} with in_keys {keys} holds no flow; expected a TensorDictModule of "
            "(observation, noisy action, time), a DiffusionActor, or a loss module with one of them as actor_network. "
            "An actor of another kind cannot be steered while it samples."
        )
    return inner if params is None else _Functional(given, params)


def _critic(given: Any, optional: bool = False) -> Any:
    if isinstance(given, (list, tuple)):
        return [_critic(member) for member in given]
    for name in ("qvalue_network", "value_network"):
        network = getattr(given, name, None)
        if network is not None and _action_at(network) is not None:
            return _in_order(network, _Functional(network, getattr(given, f"{name}_params")))
    if not optional and _action_at(given) is not None and isinstance(getattr(given, "module", None), nn.Module):
        return _in_order(given, given.module)
    if optional:
        return None
    raise TypeError(
        f"from_torchrl: critic is {type(given).__name__} with in_keys {getattr(given, 'in_keys', None)}; expected a "
        "TensorDictModule of an observation and an action (in_keys such as ['observation', 'action']), a list of them, "
        "or a loss module with such a qvalue_network."
    )


def _action_at(network: Any) -> int | None:
    """The place of the action among two in_keys; None where this is no critic."""
    keys = [key[-1] if isinstance(key, tuple) else key for key in getattr(network, "in_keys", None) or ()]
    return keys.index("action") if len(keys) == 2 and "action" in keys else None


def _with_widths(critic: nn.Module, flow: DiffusionVelocity) -> nn.Module:
    """The critic, told the widths that a flow which stays a callable reads: from_module finds them as attributes."""
    told: Any = as_critic(critic, call=lambda critic, obs, actions: critic(obs, actions))
    network: Any = flow.network
    told.obs_dim, told.action_dim = network.obs_dim, network.action_dim
    return told


def _in_order(network: Any, module: nn.Module) -> nn.Module:
    """The module as (obs, actions) -> q_values."""
    if _action_at(network) == 1:
        return module
    return as_critic(module, call=lambda module, obs, actions: module(actions, obs))


class _Functional(nn.Module):
    """A loss module's network with its parameters, one set of them or a stack: outputs are then [E, ...].

    Args:
        network: the TensorDictModule, whose own parameters are not read. params: a TensorDictParams.
    """

    template: Any

    def __init__(self, network: Any, params: TensorDictParams) -> None:
        super().__init__()
        self.params = params
        self.__dict__["template"] = copy.deepcopy(network).to("meta")  # unregistered: it holds no parameters

    def forward(self, *inputs: Tensor) -> Tensor:
        if not self.params.batch_size:
            return self._with(self.params, *inputs)
        return torch.vmap(self._with, (0, *[None] * len(inputs)), randomness="different")(self.params, *inputs)

    def _with(self, params: Any, *inputs: Tensor) -> Tensor:
        with params.to_module(self.template):
            return self.template.module(*inputs)


class _ScoreNetwork(nn.Module):
    """DiffusionActor's noise predictor, as (obs, x, timestep [B]) -> e."""

    network: Any
    template: Any

    def __init__(self, actor: Any, params: TensorDictParams | None) -> None:
        super().__init__()
        self.action_dim = actor.module.action_dim
        first = next((layer for layer in actor.module.score_network.modules() if isinstance(layer, nn.Linear)), None)
        self.obs_dim = None if first is None else (first.in_features - self.action_dim - 1) or None
        if params is None:
            self.network = actor.module.score_network
        else:
            self.params = params
            self.__dict__["template"] = copy.deepcopy(actor).to("meta")  # unregistered: it holds no parameters

    def forward(self, obs: Tensor, x: Tensor, timestep: Tensor) -> Tensor:
        inputs = torch.cat([x, obs.to(x.dtype), timestep.unsqueeze(1)], dim=1)
        if "template" not in vars(self):
            return self.network(inputs)
        with self.params.to_module(self.template):
            return self.template.module.score_network(inputs)
