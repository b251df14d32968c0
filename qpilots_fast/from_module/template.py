"""Critics as one template and the stacked parameters of its members, as TorchRL's losses and torch.func hold them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .sources import is_mapping, mapping_entries


class StackedTemplate(nn.Module):
    """Each member is the template with its entries of params; called as the template is, all members at once.

    Args:
        template: its own numbers are never read; it may be on the meta device.
        params: TensorDictParams, or a dict as torch.func.stack_module_state makes it: [E, ...] by the template's names.
    """

    def __init__(self, template: nn.Module, params: Any) -> None:
        super().__init__()
        self.__dict__["_template"] = (template,)  # no submodule: its parameters are none of this network's
        self.params = params

    def forward(self, *inputs: Tensor) -> Any:
        stacked = {".".join(map(str, keys)): tensor for keys, tensor in mapping_entries(self.params)}

        def member(params: dict[str, Tensor]) -> Any:
            return torch.func.functional_call(self.__dict__["_template"][0], params, inputs)

        return torch.vmap(member)(stacked)


def stacked_template(given: Any) -> StackedTemplate | None:
    """The module of (template, params); None where this is something else."""
    pair = isinstance(given, (list, tuple)) and len(given) == 2
    if not pair or not isinstance(given[0], nn.Module) or is_mapping(given[0]) or not is_mapping(given[1]):
        return None
    return StackedTemplate(*given)
