"""Flows that run from noise at tau = 1 to data at tau = 0, as openpi and LeRobot train them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class ReversedTimeFlow(nn.Module):
    """velocity(obs, x, t) = -module(obs, x, tau = 1 - t): a drop-in flow for SteeredSampler.

    There x_tau = tau e + (1 - tau) a and the network predicts e - a; here x_t = t a + (1 - t) e and a - e.

    Args:
        module: called as module(obs, x, tau), x [B, A] or [B, C, D], tau [B]; returns e - a in x's shape.
        chunk_shape: (C, D): the module takes a chunk of C actions, each D wide (padding included); the sampler's
            actions are the flattened chunk, A = C * D. None: the module takes [B, A].
        call: (module, obs, x, tau [B]) -> e - a, where the module has another signature (keywords, a KV cache).

    Raises:
        TypeError: for a module that cannot be called.
        ValueError: for a chunk_shape that is not (C, D), or in a call an action of another width.

    Example:
        ```python
        SteeredSampler(ReversedTimeFlow(expert, chunk_shape=(50, 32)), critic,
                       replace(Steering.qpilots_u(jacobian="identity"), steered_dims=real_dims(50, 32, 7)))
        ```
    """

    def __init__(
        self,
        module: Callable[..., Tensor],
        *,
        chunk_shape: tuple[int, int] | None = None,
        call: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not callable(module):
            raise TypeError(f"ReversedTimeFlow: module is {type(module).__name__}; expected a callable.")
        if chunk_shape is not None and (len(chunk_shape) != 2 or any(size < 1 for size in chunk_shape)):
            raise ValueError(f"ReversedTimeFlow: chunk_shape is {chunk_shape!r}; expected (steps, padded width).")
        self.module = module
        self.chunk_shape = chunk_shape
        self._call_module = call

    def forward(self, obs: Any, noisy_actions: Tensor, t: Tensor) -> Tensor:
        """Returns the velocity [B, A] at noisy_actions [B, A], t [B, 1] in [0, 1]; obs is passed on as it is."""
        x = noisy_actions
        if self.chunk_shape is not None:
            if x.shape[1] != self.chunk_shape[0] * self.chunk_shape[1]:
                raise ValueError(
                    f"ReversedTimeFlow: noisy_actions has shape {list(x.shape)}; expected [B, "
                    f"{self.chunk_shape[0] * self.chunk_shape[1]}], a flattened chunk {self.chunk_shape}."
                )
            x = x.unflatten(1, self.chunk_shape)
        tau = (1 - t).reshape(-1)
        backward = (
            self.module(obs, x, tau) if self._call_module is None else self._call_module(self.module, obs, x, tau)
        )
        return -backward.reshape(noisy_actions.shape)


def real_dims(num_steps: int, padded_width: int, real_width: int) -> tuple[int, ...]:
    """Indices of the unpadded entries of a flattened chunk [C, padded_width]: for Steering.steered_dims, or a critic.

    Args:
        num_steps: C, actions in a chunk.
        padded_width: what the network outputs per action (32 in openpi).
        real_width: the robot's action width; entries beyond it are padding, which the base flow moves alone.

    Raises:
        ValueError: unless num_steps >= 1 and 1 <= real_width <= padded_width.
    """
    if not 1 <= real_width <= padded_width or num_steps < 1:
        raise ValueError(
            f"real_dims: num_steps={num_steps}, padded_width={padded_width}, real_width={real_width}; expected "
            "num_steps >= 1 and 1 <= real_width <= padded_width."
        )
    return tuple(step * padded_width + d for step in range(num_steps) for d in range(real_width))
