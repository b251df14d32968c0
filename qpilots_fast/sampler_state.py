"""What a sampler is between calls: its settings, its networks, and the way that calls take."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import backends
from .callables import is_list
from .inputs import as_tensor, check_obs
from .networks import PackableNetwork, slots_hold
from .recognition import OwnModule, recognised
from .remarks import Remarks
from .runs import CallableRun, Choices, PackedRun, make_run
from .settings import check_argument_order, check_settings, read_setting
from .steering import Steering

_Sampler = TypeVar("_Sampler", bound="SamplerState")

_log = logging.getLogger("qpilots_fast")

# what a run is made from: assigning one makes another
_SETTINGS = (
    "flow", "critic", "posterior", "steering", "num_steps", "time_grid", "precision", "action_low", "action_high",
    "critic_layout", "chunk_shape",
)  # fmt: skip
# found or made anew by a copy
_NOT_COPIED = ("_run", "_choices", "_remarks", "_own")


@dataclass(eq=False)
class CriticsOf:
    """A ModuleList that was given as the critic, whose entries may be replaced: calls ask those that it holds then.

    Args:
        given: the list; what calls ask is made of its entries.
        slots: they are those of its making while these hold.
    """

    given: nn.ModuleList
    slots: backends.Slots = field(init=False)

    def __post_init__(self) -> None:
        entries = self.given._modules
        self.slots = [*((entries, name, critic) for name, critic in entries.items()), (entries, None, len(entries))]

    @property
    def edited(self) -> bool:
        return not slots_hold(self.slots)


class SamplerState(nn.Module):
    """The settings of a SteeredSampler, checked and read at assignment; assigning one makes another run."""

    flow: Any
    critic: Any
    posterior: Any
    steering: Steering
    num_steps: int
    time_grid: tuple[float, ...] | None
    chunk_shape: tuple[int, int] | None
    backend: str
    precision: str
    _run: PackedRun | CallableRun
    _critics: CriticsOf | None = None

    def __init__(self) -> None:
        super().__init__()
        self._own: dict[str, OwnModule] = {}
        self._frozen = False
        self._choices, self._remarks = Choices(), Remarks()

    @property
    def networks(self) -> dict[str, Any]:
        """The networks that calls ask, by name ("flow", "critic", "posterior"): those given, your modules packed."""
        return self._asked()

    def _given(self) -> dict[str, Any]:
        return {"flow": self.flow, "critic": self.critic, "posterior": self.posterior}

    def _asked(self, obs: Any = None, noise: Any = None, frozen: bool = False) -> dict[str, Any]:
        """The networks that a call with such obs and noise asks; obs None: any that packed networks read."""
        asked = self._given()
        for name, own in self._own.items():
            if own.given is asked[name] and own.network is not None:
                packed = (frozen or not own.reason) and (obs is None or own.reads(obs, noise))
                asked[name] = own.network if packed else own.as_callable()
        return asked

    def _current(self, obs: Any = None, noise: Any = None) -> tuple[PackedRun | CallableRun, dict[str, Any]]:
        """The way that a call takes now, whatever became of the networks since the last one, and the networks."""
        frozen = self._run.holds_weights
        if not frozen and not torch.compiler.is_compiling():
            if self._critics is not None and self._critics.edited:
                self.critic = self._critics.given
            elif any(own.edited for own in self._own.values()):
                self._run = self._make_run()
        networks = self._asked(obs, noise, frozen)
        if not self._run.fits(networks):
            self._run = self._make_run(networks)
        return self._run, networks

    def _make_run(self, networks: dict[str, Any] | None = None) -> PackedRun | CallableRun:
        """The way that calls take; made anew where what earlier calls kept must be forgotten."""
        check_settings(self)
        if self._frozen and "_run" in self.__dict__ and self._run.holds_weights:
            _log.warning(
                "a frozen SteeredSampler was moved, or a setting of it assigned: its next call packs the parameters as "
                "they are then."
            )
        if networks is None:
            self._own = recognised(self._given(), self.steering, self.chunk_shape, self._own)
            networks = self._asked()
        steering = self.steering
        if steering.steers and not any(step.weight for step in steering.schedule(self.num_steps, self.time_grid)):
            self._remarks.on_no_step(steering, self.num_steps)
        slots: dict[str, backends.Slots] = {}
        for name, network in networks.items():
            own = self._own.get(name)
            slots[name] = [(self._modules, name, self._modules.get(name))]
            slots[name] += own.slots if own is not None and own.network is network else []
            slots[name] += self._critics.slots if name == "critic" and self._critics is not None else []
        return make_run(self, networks, slots, self._frozen, self._choices, self._remarks)

    def _is_untraceable(self, obs: Any, noise: Any) -> bool:
        """Whether a call asks users' code, which torch.compile does not trace with the sampler."""
        networks = self._asked(obs, noise).values()
        packed = (network is None or isinstance(network, PackableNetwork) for network in networks)
        return not all(packed) or any(n is not None and n.spec.own_columns is not None for n in networks)

    def _check_unread(self, obs: Any, error: Exception) -> None:
        """Raises what is wrong with an obs that a packed network would have refused, and its module raised on."""
        for own in self._own.values():
            if own.network is not None and not own.reads(obs, None):
                try:
                    check_obs(as_tensor("obs", obs, self._device()), own.network, self._device())
                except (TypeError, ValueError) as wrong:
                    raise wrong from error

    def _device(self) -> torch.device:
        parameter = next(self.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    # ------------------------------------------------------------ nn.Module plumbing

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "backend" and value not in ("auto", *backends.BACKENDS):
            named = ", ".join(map(repr, backends.BACKENDS))
            raise ValueError(f"backend is {value!r}; expected 'auto' or one of {named}.")
        check_argument_order(name, value)
        before = {known: getattr(self, known, None) for known in (name, "num_steps", "_critics")}
        self._put(name, read_setting(name, value))
        if name == "critic":
            self._critics = CriticsOf(value) if is_list(value) else None
        if name == "time_grid" and self.time_grid is not None:
            super().__setattr__("num_steps", len(self.time_grid) - 1)  # type: ignore[arg-type]
        if name in _SETTINGS and "_run" in self.__dict__:
            try:
                self._run = self._make_run()
            except Exception:
                for known, old in before.items():
                    self._put(known, old)
                raise

    def _put(self, name: str, value: Any) -> None:
        if not isinstance(value, nn.Module):  # nn.Module lets nothing else take a module's place
            self.__dict__.get("_modules", {}).pop(name, None)
        super().__setattr__(name, value)

    def _apply(self: _Sampler, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Sampler:
        moved = super()._apply(fn, recurse)
        self._run = self._make_run()  # parameters may be elsewhere: pack again where they are now
        return moved

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _NOT_COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._choices, self._remarks, self._own = Choices(), Remarks(), {}
        self._remarks.no_step_open = False  # said when the original was made
        self._run = self._make_run()

    def extra_repr(self) -> str:
        return (
            f"{self.steering}, num_steps={self.num_steps}, backend={self.backend!r}, precision={self.precision!r}"
            + (", frozen" if self._frozen else "")
        )
