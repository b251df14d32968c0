"""A LeRobot checkpoint behind the same lines as the small policy: what steering costs there, and how far it moves.

Its critics are untrained and its observations random: time and mechanism only. For success, give your environment's
observations and your critics to `lerobot.steer`, as evaluate.py does with the small policy.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class
from torch import Tensor, nn

from qpilots_fast import CriticEnsemble, Steering
from qpilots_fast.integrations.lerobot import steer

NUM_TOKENS = 8  # of a random instruction
REPEATS = 3


def random_batch(config: Any) -> dict[str, Tensor]:
    """One observation in the shapes that the policy's configuration asks for."""
    batch = {name: torch.rand(1, *feature.shape) for name, feature in config.input_features.items()}
    if hasattr(config, "max_action_dim"):  # the action experts are told in words
        batch["observation.language.tokens"] = torch.randint(0, 20, (1, NUM_TOKENS))
        batch["observation.language.attention_mask"] = torch.ones(1, NUM_TOKENS, dtype=torch.bool)
    return batch


def compare(policy: nn.Module) -> dict[str, tuple[float, float]]:
    """Per method: median milliseconds a chunk, and how far its actions lie from the unsteered ones (L2)."""
    config: Any = policy.config
    batch = {name: value.to(config.device) for name, value in random_batch(config).items()}
    real = config.action_feature.shape[0]
    expert = hasattr(config, "max_action_dim")
    steps = config.chunk_size if expert else config.horizon
    state_dim = batch["observation.state"].shape[-1]
    critics = CriticEnsemble(state_dim, steps * real, hidden_dims=(256, 256)).to(config.device)
    critic = lambda seen, a: critics(seen["observation.state"].view(len(a), -1, state_dim)[:, -1], a.flatten(1))  # noqa: E731
    rows = {"unsteered": None, "U, identity": Steering.qpilots_u(jacobian="identity")}
    if expert:
        rows["U, full"] = Steering.qpilots_u()
    plain, found = None, {}
    for name, steering in rows.items():
        handle = None if steering is None else steer(policy, critic, steering)
        times = []
        for _ in range(REPEATS):
            torch.manual_seed(0)
            policy.reset()
            start = time.perf_counter()
            with torch.inference_mode():
                action = policy.select_action(dict(batch)).float()
            times.append(1e3 * (time.perf_counter() - start))
        plain = action if plain is None else plain
        found[name] = statistics.median(times), (action - plain).norm().item()
        if handle is not None:
            handle.remove()
    return found


def try_checkpoint(name: str) -> None:
    """Loads a checkpoint, a folder or a name on the hub, and prints the comparison."""
    policy = get_policy_class(PreTrainedConfig.from_pretrained(name).type).from_pretrained(name).eval()
    for method, (milliseconds, moved) in compare(policy).items():
        print(f"{method:12} {milliseconds:8.1f} ms a chunk, first action moved by {moved:.3f}")
