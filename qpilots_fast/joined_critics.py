"""Several packed critics of one structure as one ensemble."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .networks import PackableNetwork, Slots, module_slots


def are_alike(critics: Sequence[object]) -> bool:
    """Whether these are packed critics of one structure, whatever their numbers of members."""
    specs = [
        replace(c.spec, num_members=1, stacked=True)
        for c in critics
        if isinstance(c, PackableNetwork) and c.spec.kind == "critic" and c.spec.own_columns is None
    ]
    return bool(specs) and len(specs) == len(critics) and all(spec == specs[0] for spec in specs)


class JoinedCritics(PackableNetwork):
    """q_values [E, B] of several packed critics of one structure, their members one after another.

    Args:
        critics: at least one; see `are_alike`. Their parameters stay theirs, and live.
    """

    def __init__(self, critics: Sequence[PackableNetwork]) -> None:
        super().__init__()
        for index, critic in enumerate(critics):
            self.add_module(str(index), critic)  # by the names that a ModuleList gives
        specs = [critic.spec for critic in critics]
        self.spec = replace(specs[0], num_members=sum(spec.num_members for spec in specs), stacked=False)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[PackableNetwork]:
        return iter(self._modules.values())  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> PackableNetwork:
        return list(self)[index]

    def flat_parameters(self) -> list[Tensor]:
        by_critic = [self._by_member(critic) for critic in self]
        return [member for same in zip(*by_critic) for members in same for member in members]

    @staticmethod
    def _by_member(critic: PackableNetwork) -> list[Sequence[Tensor]]:
        """For each parameter of the structure, that of every member."""
        flat, count = critic.flat_parameters(), critic.spec.num_members
        if critic.spec.stacked:
            return [parameter.unbind(0) for parameter in flat]
        return [flat[i : i + count] for i in range(0, len(flat), count)]

    def slots(self) -> Slots | None:
        """Views follow the parameters that they are of."""
        whole = [critic.slots() for critic in self]
        return None if any(slots is None for slots in whole) else module_slots(self)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Returns q_values [E, B] at obs [B, S], actions [B, A]."""
        return torch.cat([critic(obs, actions) for critic in self])
