"""Networks as users write them, which from_module recognises."""

from __future__ import annotations

import torch
from torch import nn

S, A, H = 6, 4, 16


def mlp(width_in: int, width_out: int, act=nn.SiLU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, H), act(), nn.Linear(H, H), act(), nn.Linear(H, width_out))


class Flow(nn.Module):
    def __init__(self, act=nn.SiLU):
        super().__init__()
        self.net = mlp(S + A + 1, A, act)

    def forward(self, obs, x, t):
        return self.net(torch.cat([obs, x, t], -1))
