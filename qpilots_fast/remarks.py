"""What a sampler says once: that its actions are clipped much, and that its critic sees only some of their columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .backends import capturing
from .bounds import DefaultBound
from .reference import Evaluators
from .spec import BoundNetwork, Pullback
from .steering import Steering
from .user_warning import warn

_CALLS_LOOKED_AT = 8  # later ones cost nothing; a look waits for a GPU
_CLIPPED_SHARE = 0.1


class Remarks:
    """What one sampler has said already, and how many calls are still looked at."""

    def __init__(self) -> None:
        self.calls_left = _CALLS_LOOKED_AT
        self._padding_open = self.no_step_open = True

    def on_no_step(self, steering: Steering, num_steps: int) -> None:
        """Says that a steering with a strength steers nowhere."""
        if self.no_step_open:
            self.no_step_open = False
            cause = (
                "its window or step weights" if steering.window or steering.step_weights else "steer_first_step=False"
            )
            warn(
                f"qpilots_fast: alpha is {steering.alpha:g}, but none of the {num_steps} steps is steered ({cause}); "
                "actions are the flow's own. Pass more steps, steer_first_step=True, or a window that has a step's "
                "time t_k in it."
            )

    def on_actions(self, actions: Tensor, low: Any, high: Any) -> None:
        """Says where many entries of the actions end on bounds that nobody gave."""
        if capturing(actions.device):
            return  # a look at the numbers would end the capture
        self.calls_left -= 1
        if not isinstance(low, DefaultBound) and not isinstance(high, DefaultBound):
            self.calls_left = 0
            return
        ends = torch.zeros_like(actions, dtype=torch.bool)
        if isinstance(low, DefaultBound):
            ends |= actions <= low
        if isinstance(high, DefaultBound):
            ends |= actions >= high
        count = int(ends.sum())
        if count < 2 or count <= _CLIPPED_SHARE * actions.numel():
            return
        self.calls_left = 0
        warn(
            "qpilots_fast: more than a tenth of the entries of a batch of actions ended on the default bounds [-1, 1], "
            "clipped there. For z-scored or unbounded actions pass action_low=None, action_high=None; for an "
            "environment's own box its low and high; where [-1, 1] is meant, action_low=-1.0, action_high=1.0.",
        )

    def on_weights(self, critic: BoundNetwork, steering: Steering) -> None:
        """`on_gradient` of a packed critic, whose first layer tells it."""
        if not self._concerns(steering):
            return
        columns, read = critic.spec.moving_columns, critic.spec.action_columns
        zero = torch.stack([(weight[:, columns] == 0).all(0) for weight in critic.layers[0].weight]).all(0)
        if read is not None:  # an action that several columns read is absent where all of them are
            zero = torch.stack([zero[[c == dim for c in read]].all() for dim in range(critic.spec.action_dim)])
        self._say_padding(zero)

    def watching(self, net: Evaluators, steering: Steering) -> Evaluators:
        """The same networks; the first gradient that is asked of the critic is looked at."""
        ask, step = net.critic, net.steered
        if ask is None or not self._concerns(steering):
            return net

        def watched(*arguments: Any) -> tuple[Tensor, Pullback]:
            assert ask is not None
            values, pullback = ask(*arguments)
            return values, self._looks_at(pullback) if self._padding_open else pullback

        def watched_step(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
            assert step is not None
            return step(*arguments, self._look if self._padding_open else None)

        return replace(net, critic=watched, steered=None if step is None else watched_step)

    def _looks_at(self, pullback: Callable[[Tensor], Tensor]) -> Pullback:
        def pull_back(weights: Tensor) -> Tensor:
            gradient = pullback(weights)
            self._look(gradient)
            return gradient

        return pull_back

    def _look(self, gradient: Tensor) -> None:
        """At the critic's own gradient [B, A]."""
        if self._padding_open:
            self._say_padding((gradient == 0).all(0))

    def _concerns(self, steering: Steering) -> bool:
        # under other scales than the norm match a column without a gradient changes nothing in the others
        self._padding_open &= steering.steers and steering.steered_dims is None and steering.scale == "norm_match"
        return self._padding_open

    def _say_padding(self, zero: Tensor) -> None:
        """Says which columns have a gradient that is exactly zero, where others have one."""
        if capturing(zero.device):
            return
        self._padding_open = False
        absent = zero.nonzero().flatten().tolist()
        if not absent or len(absent) == len(zero):
            return
        real = [column for column in range(len(zero)) if column not in absent]
        warn(
            f"qpilots_fast: the critic's gradient is exactly zero in columns {_spans(absent)} of {len(zero)} of the "
            "actions (padding?), but Steering.steered_dims is None: the norm match counts the velocity of all columns, "
            f"so the push on the others is too strong. Pass replace(steering, steered_dims={_as_code(real)}).",
        )


def _spans(columns: list[int]) -> str:
    """[0, 7, 8, 9] as "0, 7 to 9"."""
    spans: list[list[int]] = []
    for column in columns:
        if spans and column == spans[-1][1] + 1:
            spans[-1][1] = column
        else:
            spans.append([column, column])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in spans)


def _as_code(columns: list[int]) -> str:
    consecutive = columns == list(range(columns[0], columns[-1] + 1))
    if consecutive and len(columns) > 2:
        first = f"{columns[0]}, " if columns[0] else ""
        return f"tuple(range({first}{columns[-1] + 1}))"
    return repr(tuple(columns))
