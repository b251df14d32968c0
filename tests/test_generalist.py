"""The small language-conditioned policy: its loop against the formula, its weights, its methods, its training."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qpilots_fast import Steering
from qpilots_fast.demo import command
from qpilots_fast.demo.generalist import methods
from qpilots_fast.demo.generalist.critics import GeneralistCritics
from qpilots_fast.demo.generalist.instructions import ASSETS, HELD_OUT, TASKS, TRAINED, embedding
from qpilots_fast.demo.generalist.policy import (
    ACTION_DIM,
    CHUNK,
    PADDED_DIM,
    STATE_DIM,
    GeneralistConfig,
    GeneralistPolicy,
)
from qpilots_fast.demo.generalist.weights import load_critics, load_policy, save
from qpilots_fast.reference import aggregate

EXAMPLE = Path(__file__).parents[1] / "examples" / "generalist"
B = 6


def batch_and_noise(seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "observation.state": torch.rand(B, STATE_DIM, generator=generator),
        "observation.language": torch.stack([embedding(TRAINED[task][0]) for task in TASKS]),
    }
    return batch, torch.randn(B, CHUNK, PADDED_DIM, generator=generator)


@pytest.fixture(scope="module")
def networks() -> tuple[GeneralistPolicy, GeneralistCritics]:
    return load_policy(), load_critics()


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    yield
    for name in ("critics", "train", "evaluate"):
        sys.modules.pop(name, None)


def test_every_phrasing_has_an_embedding_of_length_one():
    for phrasings in (TRAINED, HELD_OUT):
        for task in TASKS:
            for sentence in phrasings[task]:
                assert embedding(sentence).norm().item() == pytest.approx(1, abs=2e-3)  # kept in float16
    trained = [sentence for task in TASKS for sentence in TRAINED[task]]
    held_out = [sentence for task in TASKS for sentence in HELD_OUT[task]]
    assert len({*trained, *held_out}) == len(trained) + len(held_out)
    with pytest.raises(KeyError):
        embedding("make coffee")


def test_weights_stay_small():
    assert sum(path.stat().st_size for path in ASSETS.glob("*.safetensors")) < 15e6


def test_policy_survives_saving(tmp_path):
    torch.manual_seed(1)
    policy = GeneralistPolicy(GeneralistConfig())
    save(policy, tmp_path / "policy.safetensors")
    for name, value in load_policy(tmp_path).state_dict().items():
        assert torch.equal(value, policy.state_dict()[name].bfloat16().float())


def test_cached_prefix_gives_what_the_whole_sequence_gives(networks):
    """The expert reads the prefix's keys and values; the prefix never reads the actions."""
    model = networks[0].model
    batch, noise = batch_and_noise()
    cache = model.embed_prefix(batch["observation.state"], batch["observation.language"])
    got = model.denoise_step(cache, noise, torch.full((B,), 0.7))
    x = model.actions_in(noise) + model.place_in_chunk
    from qpilots_fast.demo.generalist.policy import time_embedding

    time = time_embedding(torch.full((B,), 0.7), model.width).unsqueeze(1).expand_as(x)
    x = x + model.time_in(torch.cat([x, time], -1))
    for block, (keys, values) in zip(model.expert_blocks, cache):
        q, k, v = (
            part.view(B, CHUNK, block.heads, -1).transpose(1, 2)
            for part in block.qkv(block.attention_norm(x)).chunk(3, -1)
        )
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        weights = (q @ keys.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + block.out((weights @ values).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.mlp_norm(x))
    torch.testing.assert_close(got, model.actions_out(model.norm_out(x)), rtol=1e-4, atol=1e-4)


def test_words_and_state_both_change_the_action(networks):
    policy = networks[0]
    batch, noise = batch_and_noise()
    plain = policy.predict_action_chunk(batch, noise)
    other_words = {**batch, "observation.language": batch["observation.language"].roll(1, 0)}
    other_state = {**batch, "observation.state": batch["observation.state"] + 0.05}
    for changed in (other_words, other_state):
        assert (policy.predict_action_chunk(changed, noise) - plain).abs().amax() > 1e-2


def test_lerobots_loop_and_the_whole_sampler_are_one(networks):
    """U through lerobot.steer, and through the SteeredSampler that ranks candidates: the same chunks."""
    policy, critics = networks
    batch, noise = batch_and_noise()
    for steering in (Steering.unsteered(), Steering.qpilots_u(0.3), Steering.qgf(1.0)):
        with methods.steered(policy, critics, steering) as act:
            chunk = act(batch, noise)
        sampler = methods.whole_sampler(policy, critics, steering)
        with torch.no_grad():
            whole = sampler(methods.cached(policy, batch), noise.flatten(1))
        whole = whole.unflatten(1, (CHUNK, PADDED_DIM))[..., :ACTION_DIM]
        torch.testing.assert_close(chunk.clamp(-1, 1), whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(policy.predict_action_chunk(batch, noise), policy.predict_action_chunk(batch, noise))


def test_steering_raises_the_critics_value(networks):
    policy, critics = networks
    batch, noise = batch_and_noise()

    def value(steering: Steering) -> float:
        with methods.steered(policy, critics, steering) as act, torch.no_grad():
            return aggregate(critics(batch, act(batch, noise).clamp(-1, 1)), "pessimistic", 0.5).mean().item()

    base = value(Steering.unsteered())
    for jacobian in ("full", "identity"):
        assert base < value(Steering.qpilots_u(0.2, jacobian=jacobian))
    assert base < value(Steering.best_of_n(8, aggregation="pessimistic"))


def test_the_gate_leaves_out_its_share(networks):
    policy, critics = networks
    batch, noise = batch_and_noise()
    steering = Steering.qpilots_u(0.5, jacobian="identity")
    sampler = methods.whole_sampler(policy, critics, methods.gated(policy, critics, batch, steering))
    _, info = sampler(methods.cached(policy, batch), noise.flatten(1), return_info=True)
    assert 0 < info.gated_count < info.gated.numel()


def test_select_action_plays_a_chunk_to_its_end(networks):
    policy = networks[0]
    batch, _ = batch_and_noise()
    policy.reset()
    torch.manual_seed(3)
    played = torch.stack([policy.select_action(batch) for _ in range(CHUNK)], 1)
    torch.manual_seed(3)
    assert torch.equal(played, policy.predict_action_chunk(batch))
    policy.reset()


def test_returns_and_ranking_by_hand(example):
    from critics import GAMMA, discounted_returns, ranking_score

    episode, done = np.array([0, 0, 0, 1, 1]), np.array([False, False, True, False, False])
    assert discounted_returns(episode, done) == pytest.approx([GAMMA**2, GAMMA, 1, 0, 0])
    returns = np.array([1.0, 0.0, 0.9, 0.0])
    assert ranking_score(np.array([3.0, 1.0, 2.0, 0.0]), returns) == 1
    assert ranking_score(np.array([0.0, 1.0, 2.0, 3.0]), returns) == 0.25


def test_imitation_learns_a_constant_action(example):
    from train import flow_loss

    torch.manual_seed(0)
    model = GeneralistPolicy(GeneralistConfig(width=32, layers=1, heads=2)).model
    batch, _ = batch_and_noise()
    actions = torch.zeros(B, CHUNK, PADDED_DIM)
    actions[..., :ACTION_DIM] = 0.5
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        loss = flow_loss(model, *batch.values(), actions, torch.ones(B, CHUNK, dtype=torch.bool))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setattr(command, "NEEDED_BY_GENERALIST", {"no_such_module_here": '"qpilots-fast[generalist]"'})
    assert command.main(["--policy", "generalist"]) == 2
    assert 'pip install "qpilots-fast[generalist]"' in capsys.readouterr().err


def test_starts_and_noise_depend_on_the_seed_alone(networks):
    pytest.importorskip("metaworld", reason='metaworld is not installed: pip install "qpilots-fast[generalist]"')
    from qpilots_fast.demo.generalist.tasks import Tasks

    policy = networks[0]
    tasks = Tasks(1, ("window-open-v3",))
    first, second = (tasks.rollout(policy.predict_action_chunk, 1, 5, max_steps=24) for _ in range(2))
    assert np.array_equal(first[0].states, second[0].states)
    other = tasks.rollout(policy.predict_action_chunk, 1, 6, max_steps=24)
    assert not np.array_equal(first[0].states[0], other[0].states[0])
