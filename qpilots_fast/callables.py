"""Users' own networks as callables of the sampler's signatures."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .trees import map_leaves


class CriticList(nn.ModuleList):
    """Critics side by side, called as one: a list of their outputs, which the reader of critic outputs joins."""

    def forward(self, obs: Any, actions: Tensor, *t: Tensor) -> list[Any]:
        return [critic(obs, actions, *t) for critic in self]


class _Called(nn.Module):
    """A module that is called through call(module, *inputs); registers it as `.module`."""

    def __init__(self, owner: str, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        if not callable(call):
            raise TypeError(f"{owner}: call is {type(call).__name__}; expected a function call(module, obs, ...).")
        self.owner = owner
        self.module = nn.ModuleList(module) if isinstance(module, (list, tuple)) else module
        self.call = call

    def forward(self, *inputs: Any) -> Any:
        return self.call(self.module, *inputs)


def as_flow(module: Any, call: Callable[..., Tensor]) -> nn.Module:
    """A flow out of a module with another signature: velocity [B, A] = call(module, obs, noisy_actions, t [B, 1])."""
    return _Called("as_flow", module, call)


def as_critic(module: Any, call: Callable[..., Any]) -> nn.Module:
    """A critic out of a module, or a list of them, with another signature or output.

    Args:
        module: registered, so that the sampler's .to() moves it.
        call: (module, obs, actions) -> q_values, laid out as SteeredSampler reads them.
    """
    return _Called("as_critic", module, call)


def name_of(network: Any) -> str:
    """A network in a few words, for messages."""
    if isinstance(network, nn.ModuleList):
        return f"list of {len(network)} {' and '.join(dict.fromkeys(map(name_of, network)))}"
    if isinstance(network, _Called):
        return f"{network.owner}({name_of(network.module)})"
    if isinstance(network, (types.FunctionType, types.MethodType)):
        return network.__name__
    return type(network).__name__


def unwrapped(network: Any) -> Any:
    """The network inside DistributedDataParallel, DataParallel and torch.compile, at any depth."""
    while True:
        if isinstance(network, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            network = network.module
        elif isinstance(network, nn.Module) and "_orig_mod" in network._modules:
            network = network._modules["_orig_mod"]
        else:
            return network


def out_of_inference(tree: Any) -> Any:
    """The tree with clones of the tensors made under torch.inference_mode(), which autograd cannot read."""
    if isinstance(tree, Tensor):
        return tree.clone() if tree.is_inference() else tree

    def leaf(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value.is_inference() else value

    return map_leaves(leaf, tree)


def inference_tensor_error(owner: str, network: Any, error: RuntimeError) -> RuntimeError:
    """What to say where a callable holds such a tensor itself."""
    held: list[str] = []
    if isinstance(network, nn.Module):
        for path, part in network.named_modules():
            values = {**vars(part), **part._parameters, **part._buffers}
            names = [name for name, value in values.items() if isinstance(value, Tensor) and value.is_inference()]
            held += [f"{path}.{name}".lstrip(".") for name in names]
    which = (
        f"its {', '.join(held)}" if held else "one that it holds or closes over, or one inside an obs of its own type"
    )
    return RuntimeError(
        f"{owner} ({type(network).__name__}) is your own callable and needs autograd, but uses a tensor that was made "
        f"under torch.inference_mode(): {which}. Make it outside inference mode (a cache: empty it first), or replace "
        f"it there by its .clone(). PyTorch says: {str(error).splitlines()[0]}"
    )


def run_outside_inference(function: Callable[[], Any]) -> Any:
    """function() under no_grad, and not under inference_mode, which turns autograd off for good."""
    if not torch.is_inference_mode_enabled():
        return function()
    with torch.inference_mode(False), torch.no_grad():
        return function()
