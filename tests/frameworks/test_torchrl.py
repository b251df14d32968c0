"""SteeredPolicy in TorchRL's collectors, and its losses' networks as flow and critic, against TorchRL itself."""

from __future__ import annotations

import copy
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qpilots_fast import CriticEnsemble, FlowMLP, SteeredSampler, Steering

pytest.importorskip("torchrl", reason="torchrl is not installed: make test-integrations")
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.collectors import Collector, MultiAsyncCollector, MultiSyncCollector
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, InitTracker, SerialEnv, TransformedEnv
from torchrl.modules import Actor, DiffusionActor, MultiStepActorWrapper, ValueOperator
from torchrl.objectives import DDPGLoss, DiffusionBCLoss, TD3Loss

from qpilots_fast.integrations.torchrl import SteeredPolicy, from_torchrl

EXAMPLES = Path(__file__).parents[2] / "examples"
S, A = 5, 3
SPEC = Bounded(-torch.ones(A), torch.ones(A), (A,))


class Drift(EnvBase):
    """The state moves by its action; each step's noise is part of the observation."""

    def __init__(self, seed: int = 0, noise_shape: tuple[int, ...] = (A,)) -> None:
        super().__init__()
        self.observation_spec = Composite(observation=Unbounded((S,)), noise=Unbounded(noise_shape))
        self.action_spec, self.reward_spec = SPEC.clone(), Unbounded((1,))
        self.generator, self.noise_shape = torch.Generator().manual_seed(seed), noise_shape

    def _seen(self) -> dict[str, Tensor]:
        return {"observation": self.state.clone(), "noise": torch.randn(self.noise_shape, generator=self.generator)}

    def _reset(self, tensordict: TensorDict | None = None, **_: object) -> TensorDict:
        self.state = torch.randn(S, generator=self.generator)
        return TensorDict({**self._seen(), "done": torch.zeros(1, dtype=torch.bool)}, [])

    def _step(self, tensordict: TensorDict) -> TensorDict:
        self.state[:A] += tensordict["action"]
        made = {"reward": -self.state.norm().reshape(1), "done": torch.zeros(1, dtype=torch.bool)}
        return TensorDict({**self._seen(), **made}, [])

    def _set_seed(self, seed: int | None) -> None:
        self.generator.manual_seed(seed or 0)


def sampler() -> SteeredSampler:
    flow, critic = FlowMLP(S, A, (16,)), CriticEnsemble(S, A, 3, (16,))
    return SteeredSampler(flow, critic, Steering.qpilots_u(0.5), num_steps=4, action_low=-1.0, action_high=1.0)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_in_a_collector(num_envs):
    steered = sampler()
    env = Drift() if num_envs == 1 else SerialEnv(num_envs, [lambda seed=seed: Drift(seed) for seed in range(num_envs)])
    collector = Collector(env, SteeredPolicy(steered), frames_per_batch=4 * num_envs, total_frames=8 * num_envs)
    batches = 0
    for data in collector:
        rows = data.reshape(-1)
        want = steered(rows["observation"], rows["noise"])
        torch.testing.assert_close(rows["action"], want)
        other = copy.deepcopy(steered)
        with torch.no_grad():  # the collector's policy sees it at its next step
            for parameter in steered.parameters():
                parameter.mul_(1.3)
        assert not torch.allclose(
            steered(rows["observation"], rows["noise"]), other(rows["observation"], rows["noise"])
        )
        batches += 1
    assert batches == 2
    collector.shutdown()


def actions_of(steered: SteeredSampler, data: TensorDict) -> Tensor:
    """What the sampler makes of the observations and noise of a batch."""
    rows = data.reshape(-1)
    return steered(rows["observation"], rows["noise"])


@pytest.mark.parametrize("kind", [MultiSyncCollector, MultiAsyncCollector])
def test_workers_follow_the_weights(kind):
    """Two processes. In step, the batch after an update comes of the new weights; else a worker may be ahead of it."""
    steered = sampler()
    collector = kind([Drift, partial(Drift, 1)], SteeredPolicy(steered), frames_per_batch=16, total_frames=64)
    try:
        batches = iter(collector)
        first = next(batches)
        torch.testing.assert_close(first.reshape(-1)["action"], actions_of(steered, first))
        old = copy.deepcopy(steered)
        with torch.no_grad():
            for parameter in steered.parameters():
                parameter.mul_(1.3)
        collector.update_policy_weights_()
        later = [data.clone() for data in batches]
    finally:
        collector.shutdown()
    assert len(later) == 3
    for data in later if kind is MultiSyncCollector else later[-1:]:
        torch.testing.assert_close(data.reshape(-1)["action"], actions_of(steered, data))
        assert (actions_of(old, data) - actions_of(steered, data)).abs().max() > 1e-2


@pytest.mark.parametrize("settings", [{"backend": "eager"}, {"backend": "aot_eager"}])
def test_a_compiled_policy(settings):
    steered = sampler()
    collector = Collector(Drift(), SteeredPolicy(steered), frames_per_batch=4, total_frames=12, compile_policy=settings)
    for data in collector:
        torch.testing.assert_close(data["action"], actions_of(steered, data))
        with torch.no_grad():
            for parameter in steered.parameters():
                parameter.mul_(1.3)
    collector.shutdown()


@pytest.mark.parametrize("replan", [None, 2])
def test_chunks_are_executed_step_by_step(replan):
    """MultiStepActorWrapper asks for a chunk [C, A], and takes an action a step of it."""
    steps, every = 4, replan or 4
    flow, critic = FlowMLP(S, steps * A, (16,)), CriticEnsemble(S, steps * A, 3, (16,))
    steered = SteeredSampler(
        flow, critic, Steering.qpilots_u(0.5), num_steps=4, chunk_shape=(steps, A), action_low=-1.0, action_high=1.0
    )
    policy = MultiStepActorWrapper(SteeredPolicy(steered), n_steps=steps, replan_interval=replan)
    env = TransformedEnv(SerialEnv(2, [partial(Drift, seed, (steps, A)) for seed in range(2)]), InitTracker())
    data = env.rollout(2 * steps, policy)
    assert data["action"].shape == (2, 2 * steps, A)
    for k in range(2 * steps):
        asked = k - k % every
        want = steered(data["observation"][:, asked], data["noise"][:, asked])[:, k - asked]
        torch.testing.assert_close(data["action"][:, k], want)


def test_any_batch_size_keys_and_the_way_of_calling():
    steered = sampler()
    policy = SteeredPolicy(steered, in_keys=[("agent", "state"), "start"], out_keys=[("agent", "act")])
    for lead in ((), (4,), (2, 3)):
        obs, noise = torch.randn(*lead, S), torch.randn(*lead, A)
        made = policy(TensorDict({"agent": {"state": obs}, "start": noise}, lead))
        assert torch.equal(made["agent", "act"], steered(obs, noise)) and made["agent", "act"].shape == (*lead, A)
    torch.manual_seed(0)
    drawn = SteeredPolicy(steered, in_keys=["observation"])(TensorDict({"observation": obs}, lead))["action"]
    torch.manual_seed(0)
    assert torch.equal(drawn, steered(obs))
    torch.manual_seed(0)
    assert torch.equal(SteeredPolicy(steered)(observation=obs), drawn)
    assert torch.equal(SteeredPolicy(steered)(observation=obs, noise=noise), steered(obs, noise))
    halved = TensorDictModule(lambda a: a / 2, in_keys=["action"], out_keys=["action"])
    both = TensorDictSequential(SteeredPolicy(steered), halved)
    made = both(TensorDict({"observation": obs, "noise": noise}, lead))
    assert torch.equal(made["action"], steered(obs, noise) / 2)


def test_policy_refusals():
    steered = sampler()
    with pytest.raises(TypeError, match="expected a SteeredSampler"):
        SteeredPolicy(steered.flow)
    with pytest.raises(ValueError, match="in_keys is"):
        SteeredPolicy(steered, in_keys="observation")
    with pytest.raises(ValueError, match="out_keys is"):
        SteeredPolicy(steered, out_keys=["action", "value"])
    with pytest.raises(KeyError, match=r"no 'observation' \(it has 'state'\)"):
        SteeredPolicy(steered)(TensorDict({"state": torch.zeros(S)}, []))


# ---------------------------------------------------------------- TorchRL's networks


class Q(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(S + A, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.net(torch.cat([obs, actions], -1))


class Velocity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(S + A + 1, 16), nn.ReLU(), nn.Linear(16, A))

    def forward(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat([obs, x, t], -1))


def flow_policy() -> TensorDictModule:
    return TensorDictModule(Velocity(), in_keys=["observation", "x", "t"], out_keys=["v"])


def losses() -> tuple[TD3Loss, DDPGLoss]:
    actor, q = Actor(nn.Linear(S, A), spec=SPEC), ValueOperator(Q(), in_keys=["observation", "action"])
    return TD3Loss(actor, q, action_spec=SPEC, num_qvalue_nets=3), DDPGLoss(actor, q)


def test_a_loss_s_stacked_critics_run_packed_and_follow_training():
    """What the critics are asked: TorchRL's own way of calling them."""
    loss, _ = losses()
    policy = flow_policy()
    made = from_torchrl(policy, critic=loss)
    steered = SteeredSampler(made.flow, made.critic, Steering.qpilots_u(0.5), num_steps=4)
    assert str(steered.explain()).count("runs packed") == 2
    obs, noise = torch.randn(6, S), torch.randn(6, A)

    def want() -> Tensor:
        """The same from plain callables: the policy's module, and each critic called by TorchRL."""

        def critic(o: Tensor, a: Tensor) -> Tensor:
            values = []
            for params in loss.qvalue_network_params.unbind(0):
                with params.to_module(loss.qvalue_network):
                    asked = loss.qvalue_network(TensorDict({"observation": o, "action": a}, [len(o)]))
                values.append(asked["state_action_value"].squeeze(-1))
            return torch.stack(values)

        flow = lambda o, x, t: policy.module(o, x, t)  # noqa: E731
        return SteeredSampler(flow, critic, Steering.qpilots_u(0.5), num_steps=4)(obs, noise)

    first = want()
    torch.testing.assert_close(steered(obs, noise), first, rtol=1e-4, atol=1e-5)
    optimiser = torch.optim.SGD([*loss.qvalue_network_params.parameters(), *policy.parameters()], lr=1.0)
    sum(parameter.square().sum() for group in optimiser.param_groups for parameter in group["params"]).backward()
    optimiser.param_groups[0]["lr"] = 0.2
    optimiser.step()
    assert (want() - first).abs().max() > 1e-3
    torch.testing.assert_close(steered(obs, noise), want(), rtol=1e-4, atol=1e-5)


def test_critics_of_every_kind():
    _, ddpg = losses()
    obs, actions = torch.randn(6, S), torch.randn(6, A)
    single = from_torchrl(flow_policy(), critic=ddpg).critic
    assert single(obs, actions).shape == (6, 1)
    with ddpg.value_network_params.to_module(ddpg.value_network):
        assert torch.equal(single(obs, actions), ddpg.value_network.module(obs, actions))
    values = [ValueOperator(Q(), in_keys=["observation", ("agent", "action")]) for _ in range(2)]
    several = from_torchrl(flow_policy(), critic=values).critic
    assert several[0] is values[0].module and len(several) == 2
    turned = ValueOperator(Q(), in_keys=["observation", "action"])
    turned.in_keys = ["action", "observation"]
    swapped = from_torchrl(flow_policy(), critic=turned).critic
    assert torch.equal(swapped(actions, obs), turned.module(obs, actions))
    assert from_torchrl(flow_policy()).critic is None


@pytest.mark.parametrize("of_loss", [False, True])
def test_a_diffusion_actor(of_loss):
    """Its noise predictor and table; actions are drawn where there is no noise: the critic's widths are told."""
    actor = DiffusionActor(action_dim=A, obs_dim=S, num_steps=20, beta_end=0.3)
    given = DiffusionBCLoss(actor) if of_loss else actor
    made = from_torchrl(given, critic=losses()[0])
    steered = SteeredSampler(made.flow, made.critic, Steering.qpilots_u(0.5), num_steps=4)
    obs, x = torch.randn(6, S), torch.randn(6, A)
    assert "critic as_critic(_Functional) runs packed" in str(steered.explain()) and steered(obs).shape == (6, A)
    ddpm, t = actor.module, 7
    alpha, sigma = ddpm.alphas_cumprod[t].sqrt(), (1 - ddpm.alphas_cumprod[t]).sqrt()
    e = ddpm.score_network(torch.cat([x, obs, torch.full((6, 1), float(t))], -1))
    want = (x - sigma * e) / alpha - e
    time = torch.full((6, 1), float(alpha / (alpha + sigma)))
    torch.testing.assert_close(made.flow(obs, x / (alpha + sigma), time), want, rtol=1e-4, atol=1e-4)
    before = steered(obs, x)
    with torch.no_grad():
        ddpm.score_network[0].weight.mul_(2.0)
    assert not torch.allclose(steered(obs, x), before)


def test_a_diffusion_actor_collects_steered():
    actor = DiffusionActor(action_dim=A, obs_dim=S, num_steps=20, beta_end=0.3)
    made = from_torchrl(DiffusionBCLoss(actor), critic=losses()[0])
    steered = SteeredSampler(made.flow, made.critic, Steering.qpilots_u(0.5), num_steps=4)
    base = SteeredSampler(made.flow, None, Steering.unsteered(), num_steps=4)
    collector = Collector(Drift(), SteeredPolicy(steered), frames_per_batch=6, total_frames=6)
    (data,) = list(collector)
    collector.shutdown()
    torch.testing.assert_close(data["action"], actions_of(steered, data))
    q = lambda actions: made.critic(data["observation"], actions).mean()  # noqa: E731
    assert q(data["action"]) > q(actions_of(base, data))


def test_network_refusals():
    loss, _ = losses()
    with pytest.raises(TypeError, match=r"in_keys \['observation'\] holds no flow"):
        from_torchrl(Actor(nn.Linear(S, A), spec=SPEC))
    with pytest.raises(TypeError, match="holds no flow"):
        from_torchrl(loss)
    with pytest.raises(TypeError, match="critic is Linear"):
        from_torchrl(flow_policy(), critic=nn.Linear(S + A, 1))


def test_the_example_runs(capsys):
    runpy.run_path(str(EXAMPLES / "quickstart_torchrl.py"), run_name="__main__")
    assert "frames" in capsys.readouterr().out
