"""Modules read operation by operation: what their numbers alone would not show."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qpilots_fast import SteeredSampler, Steering, from_module
from qpilots_fast.from_module.pointwise import identify
from qpilots_fast.row_ops import RowOp

S, A, H = 5, 3, 16


class RmsCritic(nn.Module):
    """Its norm's eps is that of the rows' dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(S + A, H), nn.RMSNorm(H), nn.Linear(H, 1)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.last(F.silu(self.norm(self.first(torch.cat([obs, actions], -1)))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_eps_of_an_rms_norm_is_that_of_the_modules_dtype(dtype):
    critic = RmsCritic().to(dtype)
    packed = from_module(critic, "critic", obs_dim=S, action_dim=A)
    assert packed.spec.chains[0][0] == RowOp("rms_norm", (torch.finfo(dtype).eps,), True)


def test_rows_near_zero_are_normed_as_the_module_does():
    torch.manual_seed(0)
    critic = RmsCritic()
    with torch.no_grad():
        critic.first.weight.mul_(1e-4)  # mean squares of 1e-8, under eps
        critic.first.bias.zero_()
    packed = from_module(critic, "critic", obs_dim=S, action_dim=A)
    obs, noise = torch.randn(9, S), torch.randn(9, A)
    flow = lambda obs, x, t: -x  # noqa: E731
    steering = Steering.qgf(weight=1.0)
    got, expected = (
        SteeredSampler(flow, one, steering, action_low=None, action_high=None)(obs, noise)
        for one in (packed, lambda obs, actions: critic(obs, actions))
    )
    assert (expected - SteeredSampler(flow, None, Steering.unsteered())(obs, noise)).abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (F.relu, RowOp("relu")),
        (F.softplus, RowOp("softplus")),  # x itself above 20
        (lambda x: F.leaky_relu(x, 0.2), RowOp("leaky_relu", (0.2,))),
        (lambda x: x.clamp(-100.0, 100.0), RowOp("clamp", (-100.0, 100.0))),
        (lambda x: torch.where(x > 60, 0.0, F.relu(x)), None),  # a cut where no small number comes
        (lambda x: F.relu(x).clamp(max=70.0), RowOp("clamp", (0.0, 70.0))),
        (lambda x: torch.where(x < -60, x + 1, torch.tanh(x)), None),
        (lambda x: torch.sign(x) * (torch.exp(x.abs()) - 1), RowOp("symexp")),  # e^300, which no float32 holds
        (lambda x: torch.sign(x) * (torch.exp(x.abs().clamp(max=70.0)) - 1), None),
        (torch.cos, None),
    ],
)
def test_functions_of_numbers_are_what_they_are_far_out_too(function, found):
    assert identify(function) == found
