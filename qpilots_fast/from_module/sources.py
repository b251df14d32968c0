"""Where a parameter lives in the user's module, so that it can be found again at every call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..callables import unwrapped


class Strided(NamedTuple):
    """A view of a contiguous tensor's memory, in elements."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """The view.

        Raises:
            ValueError: of a tensor that is not contiguous.
        """
        if not tensor.is_contiguous():
            raise ValueError(
                f"a tensor {list(tensor.shape)} of the module has strides {tensor.stride()}, which a packed network "
                "cannot view; expected a contiguous one. Make it so: tensor.data = tensor.data.contiguous()."
            )
        if self.offset == 0 and self.sizes == tensor.shape and self.strides == tensor.stride():
            return tensor
        return tensor.reshape(-1).as_strided(self.sizes, self.strides, tensor.storage_offset() + self.offset)


@dataclass(frozen=True)
class Source:
    """One tensor of a module, as a view in our layout.

    Args:
        path: names of the submodules down to the owner.
        name: the owner's parameter, buffer, plain tensor, or attribute that maps names to tensors.
        keys: where in that mapping; empty for parameters and buffers.
        views: applied in turn: "transpose" [.., in, out] -> [.., out, in]; "squeeze" [E, 1, d] -> [E, d];
            "lead" [..] -> [1, ..]; a Strided.
    """

    path: tuple[str, ...]
    name: str
    keys: tuple[Any, ...] = ()
    views: tuple[str | Strided, ...] = ()

    def __str__(self) -> str:
        return ".".join([*self.path, self.name]) + "".join(f"[{key!r}]" for key in self.keys)

    def base(self, owner: Any) -> Tensor:
        """The user's own tensor; owner is the submodule at path."""
        if not self.keys:
            return self.holder(owner)[self.name]
        value = getattr(owner, self.name) if self.name else owner
        for key in self.keys:
            value = value[key]
        return value

    def holder(self, owner: Any) -> dict[str, Tensor]:
        """The dict that holds the tensor; of one that is in no mapping."""
        for held in (owner._parameters, owner._buffers):
            if held.get(self.name) is not None:
                return held
        return vars(owner)  # a plain attribute

    def resolve(self, owner: Any) -> Tensor:
        """The live tensor, as a view of the user's memory."""
        tensor = self.base(owner)
        for view in self.views:
            if isinstance(view, Strided):
                tensor = view.of(tensor)
            elif view == "transpose":
                tensor = tensor.transpose(-1, -2)
            elif view == "squeeze":
                tensor = tensor.squeeze(1)
            else:
                tensor = tensor.unsqueeze(0)
        return tensor

    def find(self, module: nn.Module) -> Tensor:
        """The live tensor, from the root module."""
        return self.resolve(submodule(module, self.path))

    def viewed(self, *views: str | Strided) -> Source:
        return replace(self, views=(*self.views, *views))


def submodule(module: nn.Module, path: Sequence[str]) -> Any:
    """The part of a module at this path, which knows nothing of wrappers on the way."""
    owner: Any = module
    for part in path:
        owner = unwrapped(owner._modules[part])
    return owner


def part_at(module: nn.Module, path: str) -> Any:
    """`submodule` by a dotted path, as named_modules of a copy without wrappers writes it."""
    return submodule(module, path.split(".") if path else ())


def unwrap_inside(module: nn.Module) -> None:
    """Takes the parts of a copy out of DistributedDataParallel and torch.compile."""
    for part in module.modules():
        part._compiled_call_impl = None
        for name, child in part._modules.items():
            part._modules[name] = unwrapped(child)


def is_mapping(value: object) -> bool:
    """dict, TensorDict and the like; not a plain module."""
    if isinstance(value, (nn.ParameterDict, nn.ModuleDict)):
        return False
    return isinstance(value, Mapping) or (
        hasattr(value, "keys") and hasattr(value, "items") and hasattr(value, "__getitem__")
    )


def mapping_entries(mapping: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """(keys, tensor) of every tensor inside, at any depth."""
    for key in list(mapping.keys()):
        value = mapping[key]
        if isinstance(value, Tensor):
            yield (*keys, key), value
        elif is_mapping(value):
            yield from mapping_entries(value, (*keys, key))


def named_sources(module: nn.Module) -> list[tuple[Source, Tensor]]:
    """Every floating tensor of the module: parameters, buffers, and entries of mappings held as attributes."""
    found: list[tuple[Source, Tensor]] = []

    def visit(owner: Any, path: tuple[str, ...]) -> None:
        if is_mapping(owner):  # a TensorDictParams is a module and a mapping at once
            found.extend((Source(path, "", keys), tensor) for keys, tensor in mapping_entries(owner))
            return
        for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is not None:
                found.append((Source(path, name), tensor))
        for name, value in vars(owner).items():
            if not name.startswith("_") and not isinstance(value, nn.Module) and is_mapping(value):
                found.extend((Source(path, name, keys), tensor) for keys, tensor in mapping_entries(value))
        for name, child in owner._modules.items():
            if child is not None:
                visit(child, (*path, name))

    visit(module, ())
    return [(source, tensor) for source, tensor in found if tensor.is_floating_point() and not tensor.is_meta]


def find_source(module: nn.Module, wanted: Tensor | str) -> Source | None:
    """The source of a tensor (by identity) or of a dotted name; None where the module does not hold it."""
    for source, tensor in named_sources(module):
        if tensor is wanted or (isinstance(wanted, str) and str(source) == wanted):
            return source
    return None


@torch.no_grad()
def randomise(tensors: Sequence[Tensor], generator: torch.Generator) -> None:
    """Fills a copy's parameters with random numbers of order 1, so that a proof does not lean on their values.

    A zero or freshly initialised layer would agree with more than one structure.
    """
    for tensor in tensors:
        spread = 1.5 / tensor.shape[-1] ** 0.5 if tensor.ndim > 1 and min(tensor.shape[-2:]) > 1 else 0.5
        shift = 0.0 if tensor.ndim > 1 and min(tensor.shape[-2:]) > 1 else 0.3
        tensor.copy_(shift + spread * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
