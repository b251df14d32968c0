"""Users' own networks as callables of the sampler's signatures."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .trees import map_leaves


class CriticList(nn.ModuleList):
    """Critics side by side, called as one: a list of their outputs, which the reader of critic outputs joins."""

    def forward(self, obs: Any, actions: Tensor, *t: Tensor) -> list[Any]:
        return [called_as_it_takes("critic", critic)(obs, actions, *t) for critic in self]


def has_forward(module: nn.Module) -> bool:
    """Whether a module can be called: a bare ModuleList or ModuleDict cannot."""
    return getattr(module.forward, "__func__", None) is not nn.Module.forward  # of the instance: torch.compile sets one


def is_list(module: object) -> TypeGuard[nn.ModuleList]:
    """Whether this is a ModuleList that says nothing about how its members are called."""
    return isinstance(module, nn.ModuleList) and (isinstance(module, CriticList) or not has_forward(module))


def _registered(module: Any) -> Any:
    """Modules in a list or dict as one module."""
    if isinstance(module, (list, tuple)) and all(isinstance(member, nn.Module) for member in module):
        return nn.ModuleList(module)
    if isinstance(module, dict) and all(isinstance(member, nn.Module) for member in module.values()):
        return nn.ModuleDict(module)
    return module


class _Called(nn.Module):
    """A module that is called through call(module, *inputs); registers it as `.module`."""

    def __init__(self, owner: str, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        if not callable(call):
            raise TypeError(f"{owner}: call is {type(call).__name__}; expected a function call(module, obs, ...).")
        self.owner = owner
        self.module = _registered(module)
        self.call = call

    def forward(self, *inputs: Any) -> Any:
        return self.call(self.module, *inputs)


def insides(module: nn.Module) -> list[nn.Module]:
    """The module, the members of a list, and what as_flow and its like call: where a user may have said the widths."""
    if isinstance(module, _Called):
        return [module, *(insides(module.module) if isinstance(module.module, nn.Module) else [])]
    return [module, *(module if is_list(module) else [])]


def as_flow(module: Any, call: Callable[..., Tensor]) -> nn.Module:
    """A flow out of a module, or a list or dict of them, with another signature or output.

    Args:
        module: registered, so that the sampler's .to() moves it and its state_dict() holds it.
        call: (module, obs, noisy_actions [B, A], t [B, 1]) -> velocity [B, A]; chunks are [B, C, D].

    Raises:
        TypeError: for a call that is no function.
    """
    return _Called("as_flow", module, call)


def as_critic(module: Any, call: Callable[..., Any]) -> nn.Module:
    """A critic out of a module, or a list or dict of them, with another signature or output.

    Args:
        module: registered, so that the sampler's .to() moves it and its state_dict() holds it.
        call: (module, obs, actions) -> q_values, laid out as SteeredSampler reads them.

    Raises:
        TypeError: for a call that is no function.
    """
    return _Called("as_critic", module, call)


def as_posterior(module: Any, call: Callable[..., Tensor]) -> nn.Module:
    """A posterior out of a module, or a list or dict of them, with another signature or output.

    Args:
        module: registered, so that the sampler's .to() moves it and its state_dict() holds it.
        call: (module, obs, xbar [B, A], noisy_actions [B, A], t [B, 1]) -> a draw of the clean action [B, A], as the
            map of xbar from inner time 0 to 1 gives it; chunks are [B, C, D].

    Raises:
        TypeError: for a call that is no function.
    """
    return _Called("as_posterior", module, call)


def name_of(network: Any) -> str:
    """A network in a few words, for messages."""
    if is_list(network) or isinstance(network, (list, tuple)):
        return f"list of {len(network)} {' and '.join(dict.fromkeys(map(name_of, network)))}".rstrip()
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


def takes_one_tensor(network: Any) -> bool:
    """Whether a module's forward has one argument, as nn.Sequential's."""
    module = unwrapped(network)
    if not isinstance(module, nn.Module):
        return False
    forward: Any = module.forward
    bound = isinstance(forward, types.MethodType)
    return _has_one_argument(forward.__func__ if bound else forward, bound)


@lru_cache(maxsize=256)  # a list's critics are asked at every step, and reading a signature takes 10 us
def _has_one_argument(forward: Callable[..., Any], bound: bool) -> bool:
    try:
        taken = [p.kind for p in inspect.signature(forward).parameters.values()][bound:]
    except (TypeError, ValueError):  # a scripted module's
        return False
    kinds = inspect.Parameter
    several = kinds.VAR_POSITIONAL in taken
    return not several and sum(k in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD) for k in taken) == 1


def called_as_it_takes(name: str, network: Any) -> Any:
    """The network, or where it takes one tensor a function of the call's blocks that joins them to columns.

    Args:
        name: "flow", "critic" or "posterior"; a posterior's columns end with s = 0 and u = 1, those of a draw.
    """
    return _Joining(name, network) if takes_one_tensor(network) else network


class _Joining:
    """module(columns), called as (obs, actions, ...); returns what it returns."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module

    def __call__(self, obs: Any, *blocks: Tensor) -> Any:
        if not isinstance(obs, Tensor):
            raise TypeError(
                f"{self.name} {name_of(self.module)} takes one tensor, obs and actions side by side, and obs is "
                f"{type(obs).__name__}; expected a tensor [B, S]. Or say how it is called: qpilots_fast.as_{self.name}("
                "module, call=...)."
            )
        columns = [obs.to(blocks[0].dtype), *(block.flatten(1) for block in blocks)]
        if self.name == "posterior":
            columns += [torch.zeros_like(blocks[-1]), torch.ones_like(blocks[-1])]
        return self.module(torch.cat(columns, -1))


def out_of_inference(tree: Any) -> Any:
    """The tree with clones of the tensors made under torch.inference_mode(), which autograd cannot read."""
    if isinstance(tree, Tensor):
        return tree.clone() if tree.is_inference() else tree
    if tree is None or isinstance(tree, float):
        return tree

    def leaf(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value.is_inference() else value

    return map_leaves(leaf, tree)


def inference_tensor_error(owner: str, network: Any, error: RuntimeError) -> RuntimeError:
    """What to say where a callable holds such a tensor itself."""
    held: list[str] = []
    if isinstance(network, _Joining):
        network = network.module
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
