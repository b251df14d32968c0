"""Networks of action chunks [B, C, D] as networks of rows [B, C D]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .callables import called_as_it_takes
from .networks import PackableNetwork

# where a network's actions stand among its arguments, and what it is asked for
_ACTIONS = {"flow": (1,), "critic": (1,), "posterior": (1, 2)}
_SIGNATURES = {
    "flow": "flow(obs, noisy_actions, t)",
    "posterior": "posterior(obs, xbar, noisy_actions, t)",
}


def in_chunks(name: str, network: Any, chunk: tuple[int, int] | None) -> Any:
    """A callable that is shown its actions as chunks [B, C, D] and returns rows; a packed network as it is.

    A module of one tensor is shown columns, whose actions are rows.
    """
    if network is None or isinstance(network, PackableNetwork):
        return network
    called = called_as_it_takes(name, network)
    return called if chunk is None or called is not network else _shown_chunks(name, network, chunk)


def _shown_chunks(name: str, network: Callable[..., Any], chunk: tuple[int, int]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        shown = [value.unflatten(1, chunk) if i in _ACTIONS[name] else value for i, value in enumerate(arguments)]
        output = network(*shown)
        if name == "critic" or not isinstance(output, Tensor):
            return output
        want = (len(arguments[1]), *chunk)
        if tuple(output.shape) != want:
            raise ValueError(
                f"{name} returned shape {list(output.shape)}; expected {list(want)} from {_SIGNATURES[name]}, whose "
                "actions are chunks [B, C, D] here."
            )
        return output.flatten(1)

    return call
