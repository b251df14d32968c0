"""Modules that clip or saturate where no usual number reaches: packed with the clip, or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qpilots_fast import CriticEnsemble, FlowMLP, SteeredSampler, Steering, from_module
from qpilots_fast.from_module import proof
from tests.own_modules import A, S, mlp

CLIPS = {
    "clamp": lambda x: x.clamp(-300, 300),
    "clamp at 1e7": lambda x: x.clamp(-1e7, 1e7),
    "hardtanh": lambda x: nn.functional.hardtanh(x, -200, 200),
    "minimum": lambda x: torch.minimum(x, torch.tensor(1e3)),
    "where": lambda x: torch.where(x > 500, torch.full_like(x, 500), x),
    "tanh": lambda x: 1e3 * torch.tanh(x / 1e3),
    "log": lambda x: torch.where(x > 1e5, 1e5 + torch.log1p((x - 1e5).clamp(0)), x),
    "nothing": lambda x: x,
}


class Clipping(nn.Module):
    def __init__(self, kind: str, obs: str = "nothing", output: str = "nothing") -> None:
        super().__init__()
        self.is_critic = kind == "critic"
        self.net = mlp(S + A + (not self.is_critic), 1 if self.is_critic else A)
        self.clip_obs, self.clip_output = CLIPS[obs], CLIPS[output]

    def forward(self, obs: Tensor, actions: Tensor, *t: Tensor) -> Tensor:
        output = self.clip_output(self.net(torch.cat([self.clip_obs(obs), actions, *t], -1)))
        return output.squeeze(-1) if self.is_critic else output


def sample(flow, critic, obs: Tensor, noise: Tensor) -> Tensor:
    steering = replace(Steering.qpilots_u(alpha=0.3), scale="absolute")
    return SteeredSampler(flow, critic, steering, action_low=None, action_high=None)(obs, noise)


def sampled(kind: str, network, as_callable: bool, obs: Tensor, noise: Tensor) -> Tensor:
    torch.manual_seed(1)
    flow, critic = FlowMLP(S, A, (8,)), CriticEnsemble(S, A, 2, (8,))
    given = (lambda *arguments: network(*arguments)) if as_callable else network
    return sample(flow, given, obs, noise) if kind == "critic" else sample(given, critic, obs, noise)


@pytest.mark.parametrize("clip", [clip for clip in CLIPS if clip != "nothing"])
@pytest.mark.parametrize("where", ["obs", "output"])
@pytest.mark.parametrize("kind", ["flow", "critic"])
def test_packed_with_its_clip_or_refused(kind: str, where: str, clip: str) -> None:
    module = Clipping(kind, **{where: clip})
    if clip in ("log", "where") or (where == "obs" and clip != "tanh"):
        with pytest.raises(ValueError, match="clip"):
            from_module(module, kind, obs_dim=S, action_dim=A)
        return
    network = from_module(module, kind, obs_dim=S, action_dim=A)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(20)
    inputs = kind, network, False, 1e3 * torch.randn(16, S), torch.randn(16, A)
    expected = sampled(*inputs[:2], True, *inputs[3:])
    torch.testing.assert_close(sampled(*inputs), expected, rtol=1e-3, atol=1e-3)


def test_it_is_the_proof_far_away_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = pytest.raises(ValueError, match=r"1e\+04 times as large as usual, .*does it clip or saturate\?")
    module = Clipping("critic", obs="minimum")
    with refused:
        from_module(module, "critic", obs_dim=S, action_dim=A)
    monkeypatch.setattr(proof, "_FAR", ())
    from_module(module, "critic", obs_dim=S, action_dim=A)
