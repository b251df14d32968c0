"""explain_module: the structure layer by layer, or where it stopped, and the line that runs it all the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qpilots_fast as qf
from qpilots_fast import CriticEnsemble, FlowMLP, SteeredSampler, Steering
from tests.zoo.own_inputs import Critic, Everything
from tests.zoo.time_networks import A, Flow, H, S, SinusoidalMLP

DIMS = {"obs_dim": S, "action_dim": A}


class Residual(Critic):
    """Its second block adds its input, and has a function that is no activation."""

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        h = self.q1[0](torch.cat([obs, actions], -1)).relu()
        return self.q1[5](h + self.q1[2](h).sin())


class Distribution(Critic):
    def __init__(self) -> None:
        super().__init__()
        self.q1[5] = nn.Linear(H, 11)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.q1(torch.cat([obs, actions], -1)).logsumexp(-1)


class InADict(Critic):
    def forward(self, obs: Tensor, actions: Tensor) -> dict:
        return {"q": self.q1(torch.cat([obs, actions], -1))}


def test_what_packs(capsys: pytest.CaptureFixture) -> None:
    critic = Everything()
    explanation = qf.explain_module(critic, "critic", **DIMS)
    text = str(explanation)
    assert capsys.readouterr().out.strip() == text and explanation.packs
    for line in (
        "critic Everything packs",
        "members      2",
        f"reads        obs [9 columns] that the module itself makes of obs [{S}], once a call",
        "reads        actions [3 columns]: actions [2, 3, 1] of 4, scaled and shifted",
        "layer 0      Linear 12 -> 24, relu  (q1.0.weight)",
        "layer 1      Linear 24 -> 24, LayerNorm, relu  (q1.2.weight)",
        "layer 2      Linear 24 -> 1  (q1.5.weight)",
    ):
        assert line in text, text
    assert explanation.callable_seconds is not None and explanation.callable_seconds > 0
    text = str(qf.explain_module(Flow(SinusoidalMLP()), "flow", **DIMS))
    assert "t [8 columns] that the module itself makes of the times" in text
    text = str(qf.explain_module(CriticEnsemble(S, A, 3, (8,)), "critic"))
    assert "critic CriticEnsemble packs" in text and "layer 0      Linear 11 -> 8, gelu_tanh, LayerNorm" in text


@pytest.mark.parametrize(
    ("module", "stopped_at", "hint"),
    [
        (Residual(), "what lies between q1.2 (Linear 24 -> 24) and q1.5 (Linear 24 -> 1)", ""),
        (Distribution(), "q1.5 (Linear 24 -> 11)", ""),
        (InADict(), "", "call"),
    ],
)
def test_where_it_stops_and_the_line_that_works(module: nn.Module, stopped_at: str, hint: str) -> None:
    explanation = qf.explain_module(module, "critic", **DIMS)
    assert not explanation.packs
    assert (explanation.stopped_at, explanation.hint) == (stopped_at, hint)
    assert ("none can help" in str(explanation)) is not bool(hint)
    with pytest.raises(ValueError, match="cannot run as a packed critic") as error:
        qf.from_module(module, "critic", **DIMS)
    assert explanation.reason in str(error.value)
    names: dict = {"module": module, "qpilots_fast": qf, "torch": torch}
    exec(explanation.line, names)
    sampler = SteeredSampler(FlowMLP(S, A, (8,)), names["critic"], Steering.qpilots_u(), num_steps=2)
    assert sampler(torch.randn(3, S)).shape == (3, A)


def test_a_hint_that_it_names_helps() -> None:
    module = InADict()
    assert qf.explain_module(module, "critic", **DIMS, call=lambda m, obs, a: m(obs, a)["q"]).packs
    missing = qf.explain_module(Critic(), "critic")
    assert missing.hint == "obs_dim" and "cannot be told from its weights" in missing.reason


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="kind is 'policy'"):
        qf.explain_module(Critic(), "policy")
    with pytest.raises(TypeError, match="unknown hint"):
        qf.explain_module(Critic(), "critic", hidden=3)
