"""What networks' own modules make of the inputs of a call (`OwnColumns`), where the kernels read it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...spec import BoundNetwork, BoundNetworks, SamplerSpec
from ...times import column_of


class OwnValues:
    """Features and modulations of flow times, and the map of actions, of one network, for the pack kernel; float32.

    A critic that reads columns a[dims] scale + shift is one that reads a: its first weight takes the scale, and the
    shift goes into its first bias.

    Args:
        times: at which the network is asked. known: their features [T, d], where they are not its own module's.
    """

    def __init__(self, network: BoundNetwork, times: Sequence[float], known: Tensor | None) -> None:
        spec, device = network.spec, network.device
        self._times = column_of(times).to(device)  # on the device: a copy from the host would wait
        own_times = spec.time_embedding == "module" and len(times) > 0
        self._follows_times, self._follows_actions = own_times, spec.action_columns is not None
        made = torch.zeros(len(times), spec.time_embedding_dim if own_times else 0, device=device)
        self.features = made if known is None else known.to(device)
        self.scale, self.shift = torch.zeros(2, len(spec.action_columns or ()), device=device)
        self.film = torch.zeros(len(times), spec.film_dim, device=device)

    def refresh(self, network: BoundNetwork) -> None:
        """From the module as it is now; queues on the current stream."""
        if network.own is None:
            return
        if self._follows_times:
            self.features.copy_(network.own.times(self._times))
        if self._follows_actions:
            scale, shift = network.own.actions(self.scale)
            self.scale.copy_(scale)
            self.shift.copy_(shift)
        if self.film.numel():
            self.film.copy_(network.own.film(self._times))


def asks_host(spec: SamplerSpec) -> bool:
    """Whether packing live weights calls a module, which a graph does not repeat."""
    networks = spec.networks.values()
    return any(n.time_embedding == "module" or n.action_columns is not None or n.film_dim for n in networks)


def copied_encoders(spec: SamplerSpec, networks: BoundNetworks) -> dict[str, BoundNetwork]:
    """The networks that encode observations, with copies of their modules as they are now, which nothing changes."""
    found = {name: getattr(networks, name) for name, n in spec.networks.items() if n.obs_columns is not None}
    return {name: replace(network, own=copy.deepcopy(network.own)) for name, network in found.items()}


def shown_obs(
    spec: SamplerSpec, networks: BoundNetworks, obs: Tensor, frozen: dict[str, BoundNetwork]
) -> dict[str, Tensor]:
    """The block of obs of each network that takes part: obs [B, S] itself, or its own columns of it.

    Raises:
        ValueError: where a module makes another number of rows or columns than it made when it was recognised.
    """
    shown = {}
    for name, network in spec.networks.items():
        shown[name] = obs
        if network.obs_columns is not None:
            made = frozen.get(name, getattr(networks, name)).obs_input(obs)
            expected = [len(obs), network.obs_columns]
            if list(made.shape) != expected:
                raise ValueError(
                    f"backend 'triton': the {name}'s own module makes {list(made.shape)} of obs {list(obs.shape)}; "
                    f"expected {expected}, as when it was recognised. Recognise it anew with from_module."
                )
            shown[name] = made.to(torch.float32).contiguous()
    return shown
