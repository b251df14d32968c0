"""What a sampler is called with: checked, folded to rows, and the noise drawn that was not given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .bounds import bounds_width
from .callables import name_of
from .candidates import rotated_starts
from .draws import drawn, drawn_by_row, read_seeds
from .networks import PackableNetwork
from .settings import computes_float64
from .steering import Steering
from .trees import common_rows


def check_finite(name: str, value: Tensor | None) -> None:
    """Raises ValueError where a CPU tensor has a non-finite value."""
    # a GPU tensor is not looked at: it would stop the stream at every call
    if value is None or value.device.type != "cpu" or math.isfinite(value.sum().item()):
        return  # a finite sum has finite terms; an overflowing one is looked at term by term
    if not bool(torch.isfinite(value).all()):
        bad = (~torch.isfinite(value)).sum().item()
        raise ValueError(f"{name} has {bad} non-finite values; expected finite numbers (check your normalisation).")


def check_all_finite(obs: Any, noise: Tensor, posterior_noise: Tensor | None) -> None:
    """Raises ValueError where anything that a call starts from is not finite."""
    check_finite("noise", noise)
    check_finite("posterior_noise", posterior_noise)
    if isinstance(obs, Tensor) and obs.is_floating_point():
        check_finite("obs", obs)


def check_actions(actions: Tensor) -> None:
    """Raises where an action is not finite: the flow itself returned a non-finite velocity."""
    if actions.device.type != "cpu" or math.isfinite(actions.sum().item()):
        return  # a finite sum has finite terms; the sum of unbounded actions may overflow
    rows = (~torch.isfinite(actions)).any(-1).nonzero().flatten().tolist()
    if rows:
        raise ValueError(
            f"the flow's velocity is not finite in rows {rows[:8]}{'...' if len(rows) > 8 else ''}; expected finite "
            "velocities (are the flow's weights finite, and obs in the range it was trained on?)."
        )


def as_tensor(name: str, value: Any, device: torch.device) -> Any:
    """A numpy array as a tensor on a device (a copy, so that an environment may use its buffer again); else itself."""
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.kind not in "fiub":
        raise TypeError(f"{name} is an array of {value.dtype}; expected floating numbers, e.g. np.float32.")
    if value.dtype.kind == "f":  # torch knows no long double and no foreign byte order
        value = value.astype({2: np.float16, 4: np.float32}.get(value.dtype.itemsize, np.float64))
    return torch.from_numpy(np.array(value, order="C")).to(device)


def check_obs(obs: Any, packed: PackableNetwork, device: torch.device) -> Tensor:
    """obs, a tensor [..., S] that the packed network on that device reads.

    Raises:
        ValueError, TypeError: where it is none.
    """
    obs_dim = packed.spec.obs_dim
    if not isinstance(obs, Tensor):
        cure = (
            "torch.as_tensor(obs)"
            if isinstance(obs, (list, tuple))
            else "the tensor itself (obs['state'], say), or give flow and critic as callables that read your obs"
        )
        name = name_of(getattr(packed, "module", packed))
        raise TypeError(
            f"obs is {type(obs).__name__}, but {name} reads a Tensor or numpy array [..., {obs_dim}]: give {cure}."
        )
    if obs.ndim < 1 or obs.shape[-1] != obs_dim:
        raise ValueError(
            f"obs has shape {list(obs.shape)}; expected [B, {obs_dim}], [{obs_dim}], or more leading dimensions."
        )
    if not obs.is_floating_point():
        raise TypeError(
            f"obs is {obs.dtype}; expected a floating dtype: obs.float() of a tensor, obs.astype('float32') of an "
            "array, scaled as in training."
        )
    if obs.device != device:
        raise ValueError(f"obs is on {obs.device}, the networks are on {device}; move one with .to(...).")
    return obs


@dataclass(frozen=True)
class Layout:
    """How a call's own shapes fold to rows.

    Args:
        lead: obs and noise have these dimensions first: () for one observation, [B], [B, T] and so on.
        action: the shape of one action: [A], or [C, D] with A = C D.
        chunk: [C, D] where callables are shown chunks.
    """

    lead: tuple[int, ...]
    action: tuple[int, ...]
    chunk: tuple[int, int] | None = None

    @property
    def rows(self) -> int:
        return math.prod(self.lead)

    @property
    def action_dim(self) -> int:
        return math.prod(self.action)

    def unfold(self, value: Tensor, *rest: int, first: int = 0) -> Tensor:
        """[..., rows, *rest]'s rows as the leading dimensions, after `first` dimensions of the value's own."""
        if len(self.lead) == 1 and len(rest) <= 1:
            return value
        return value.reshape(*value.shape[:first], *self.lead, *rest)


@dataclass(frozen=True)
class Inputs:
    """What a call starts from, in rows: obs [B, S] or any object, noise [B, n, A], posterior_noise [K, B, N, A].

    alpha: [B], the strength of each row; None: the steering's. selection: [B, n] standard normal numbers, from which
    selection="softmax" draws.
    """

    obs: Any
    noise: Tensor
    posterior_noise: Tensor | None
    layout: Layout
    alpha: Tensor | None = None
    selection: Tensor | None = None


@dataclass(frozen=True)
class Reader:
    """Reads what one sampler is called with.

    Args:
        packed: a network that tells S and A, asked or not. reads_obs: whether a packed one takes part, so that obs must
            be [..., S].
        bounds_width: of bounds that have one number a dimension. device: the networks'.
        float64: whether the sampler computes in float64; None: as its inputs say.
    """

    steering: Steering
    num_steps: int
    packed: PackableNetwork | None
    reads_obs: bool
    device: torch.device
    chunk_shape: tuple[int, int] | None
    float64: Callable[[], bool | None]
    bounds_width: int | None = None

    @property
    def action_dim(self) -> int | None:
        """A, as the chunk_shape, a packed network or bounds of each dimension tell it."""
        if self.chunk_shape:
            return math.prod(self.chunk_shape)
        return self.bounds_width if self.packed is None else self.packed.spec.action_dim

    def read(
        self, obs: Any, noise: Any, posterior_noise: Any, generator: torch.Generator | None, seeds: Any, alpha: Any
    ) -> Inputs:
        """Checks what was given, and draws what was not.

        Raises:
            ValueError, TypeError: wrong shapes, dtypes or devices; generator together with seeds.
        """
        if self.reads_obs:
            assert self.packed is not None
            obs = check_obs(as_tensor("obs", obs, self.device), self.packed, self.device)
        noise = self._check_noise("noise", as_tensor("noise", noise, self.device), obs)
        posterior_noise = as_tensor("posterior_noise", posterior_noise, self.device)
        layout = self._layout(obs, noise)
        device = _first([v.device for v in (noise, obs) if isinstance(v, Tensor)], self.device)
        dtype = self._dtype(obs, noise)
        if isinstance(obs, Tensor) and obs.dtype == torch.float64 != dtype:
            obs = obs.to(dtype)
        start = None if noise is None else self._start(noise.to(dtype), layout)
        eps = self._posterior_noise(posterior_noise, layout, device, dtype) if self.steering.draws_posterior else None
        start, eps, selection = self._drawn(layout, (start, eps), (device, dtype), generator, seeds)
        strength = None if alpha is None else self._row_alpha(as_tensor("alpha", alpha, self.device), layout, start)
        return Inputs(self._rows_of(obs, layout), start, eps, layout, strength, selection)

    # ------------------------------------------------------------ checks

    def _check_noise(self, name: str, noise: Any, obs: Any) -> Tensor | None:
        if noise is None:
            return None
        if not isinstance(noise, Tensor) or not noise.is_floating_point():
            cure = " (torch.as_tensor(...) makes one)" if isinstance(noise, (list, tuple)) else ""
            got = getattr(noise, "dtype", type(noise).__name__)
            raise TypeError(f"{name} is {got}; expected a floating Tensor or numpy array{cure}.")
        if isinstance(obs, Tensor) and noise.device != obs.device:
            raise ValueError(f"{name} is on {noise.device}, obs on {obs.device}; expected one device.")
        return noise.detach()  # a call is not tracked: callables would be taken to lose this gradient

    def _dtype(self, obs: Any, noise: Tensor | None) -> torch.dtype:
        given = [value for value in (obs, noise) if isinstance(value, Tensor) and value.dtype == torch.float64]
        # float64 observations (gymnasium's, numpy's) do not make a float32 sampler compute in float64
        return torch.float64 if given and self.float64() is not False else torch.float32

    # ------------------------------------------------------------ shapes

    def _layout(self, obs: Any, noise: Tensor | None) -> Layout:
        chunk = self.chunk_shape
        action_dim = self.action_dim
        if noise is None:
            rows = None if isinstance(obs, Tensor) else common_rows(obs)
            if rows is None and (not isinstance(obs, Tensor) or obs.ndim < 1):
                of_one = (
                    " One observation goes in as a batch of one: {key: value[None] for key, value in obs.items()}."
                    if isinstance(obs, Mapping)
                    else ""
                )
                raise ValueError(
                    f"noise is None and obs is {type(obs).__name__}, so the batch size is unknown; give noise [B, A], "
                    f"or an obs whose tensors all have B rows.{of_one}"
                )
            if action_dim is None:
                raise ValueError(
                    "noise is None and no network tells the action width; give noise [B, A], or the sampler bounds of "
                    "that width (action_low=[-1.0] * A), or, where callables take chunks, a chunk_shape. "
                    "print(sampler.explain()) says why a network was not recognised."
                )
            return Layout(self._lead(obs) if rows is None else (rows,), chunk or (action_dim,), chunk)
        lead = self._lead(obs) if self.reads_obs else self._lead_beside(obs, noise)
        rest, count = tuple(noise.shape[len(lead) :]), self.steering.num_candidates
        if tuple(noise.shape[: len(lead)]) != lead:
            if len(lead) == 1 and noise.ndim > 1:
                raise ValueError(f"noise has {noise.shape[0]} rows, obs {lead[0]}; expected the same.")
            rest = ()
        elif count > 1 and len(rest) > 1 and rest != chunk:  # candidates stand before the action's own dimensions
            rest = rest[1:] if rest[0] == count else ()
        if (
            len(rest) not in (1, 2)
            or math.prod(rest) != (action_dim or math.prod(rest))
            or (len(rest) == 2 and chunk not in (None, rest))
        ):
            raise ValueError(f"noise has shape {list(noise.shape)}; expected {self._expected(lead, action_dim)}.")
        return Layout(lead, rest, chunk if len(rest) == 1 else (rest[0], rest[1]))

    def _lead(self, obs: Tensor) -> tuple[int, ...]:
        """The leading dimensions that obs alone says."""
        if self.reads_obs:
            return tuple(obs.shape[:-1])
        return () if obs.ndim == 1 and obs.is_floating_point() else tuple(obs.shape[:1])

    def _lead_beside(self, obs: Any, noise: Tensor) -> tuple[int, ...]:
        """The leading dimensions that noise says, where callables alone read obs, which may have any shape."""
        chunk, shape = self.chunk_shape, tuple(noise.shape)
        one = len(shape) == 1 or (shape == chunk and isinstance(obs, Tensor) and obs.ndim == 1)
        if one:
            if not isinstance(obs, Tensor):
                raise ValueError(
                    f"noise has shape {list(shape)}, for one observation, but obs is {type(obs).__name__}; expected "
                    "noise [1, A] and obs with a batch dimension of its own."
                )
            return ()
        if self.steering.num_candidates > 1 or (chunk is None and len(shape) < 4):
            return shape[:1]
        lead = shape[:-1] if chunk is not None and shape[-2:] != chunk else shape[:-2]
        if len(lead) > 1 and not (isinstance(obs, Tensor) and tuple(obs.shape[: len(lead)]) == lead):
            got = list(obs.shape) if isinstance(obs, Tensor) else type(obs).__name__
            raise ValueError(
                f"noise has leading dimensions {list(lead)}, obs is {got}; expected a tensor with the same."
            )
        return lead

    def _expected(self, lead: tuple[int, ...], action_dim: int | None) -> str:
        """The shapes of noise in words."""
        count, chunk = self.steering.num_candidates, self.chunk_shape
        a = "A" if action_dim is None else action_dim
        shapes = [[*lead, a], [*lead, *(chunk or ("C", "D"))]]
        if count > 1:
            shapes = [shapes[0], [*lead, count, a], [*lead, count, *(chunk or ("C", "D"))]]
        words = ["[" + ", ".join(map(str, shape)) + "]" for shape in shapes]
        return " or ".join(words) + ("" if chunk or action_dim is None else f" (chunks, C D = {action_dim})")

    def _rows_of(self, obs: Any, layout: Layout) -> Any:
        """obs with one leading dimension, where it is a tensor."""
        if not isinstance(obs, Tensor) or len(layout.lead) == 1:
            return obs
        return obs.reshape(layout.rows, *obs.shape[len(layout.lead) :])

    # ------------------------------------------------------------ what a call starts from

    def _start(self, noise: Tensor, layout: Layout) -> Tensor:
        """The start [B, n, A] of n candidates, from noise that the layout fits."""
        rows, action_dim, count = layout.rows, layout.action_dim, self.steering.num_candidates
        if noise.ndim > len(layout.lead) + len(layout.action):
            return noise.reshape(rows, count, action_dim)
        return rotated_starts(noise.reshape(rows, action_dim), count)

    def _row_alpha(self, alpha: Any, layout: Layout, start: Tensor) -> Tensor:
        """The strength of each row [B]."""
        if isinstance(alpha, (list, tuple, int, float)) and not isinstance(alpha, bool):
            alpha = torch.as_tensor(alpha, dtype=start.dtype, device=start.device)
        if isinstance(alpha, Tensor) and alpha.shape == (1,) and layout.lead == ():
            alpha = alpha.reshape(())  # of one observation, as seeds=[s]
        if not isinstance(alpha, Tensor) or not alpha.is_floating_point():
            got = getattr(alpha, "dtype", type(alpha).__name__)
            raise TypeError(f"alpha is {got}; expected a floating Tensor or numpy array [B], one strength a row.")
        if tuple(alpha.shape) != layout.lead:
            raise ValueError(
                f"alpha has shape {list(alpha.shape)}; expected {list(layout.lead)}, one strength a row. "
                "One for all rows is Steering's alpha, or torch.full."
            )
        if alpha.device != start.device:
            raise ValueError(f"alpha is on {alpha.device}, noise on {start.device}; expected one device.")
        if not self.steering.steers:
            raise ValueError(
                "alpha was given to a sampler whose steering asks no critic (its own alpha, or every step weight, is "
                "0); build it with a Steering of alpha > 0, which alpha= then replaces row by row."
            )
        alpha = alpha.detach().reshape(-1)
        # a GPU tensor is not looked at: it would stop the stream at every call; there a bad row follows the base flow
        if alpha.device.type == "cpu" and not torch.compiler.is_compiling():
            bad = ~(alpha.isfinite() & (alpha >= 0))
            if bool(bad.any()):
                row = int(bad.nonzero()[0])
                raise ValueError(f"alpha is {alpha[row].item():g} in row {row}; expected numbers >= 0.")
        return alpha.to(start.dtype)

    def _posterior_noise(self, eps: Any, layout: Layout, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """The draws' noise [K, B, N, A], where it was given."""
        if eps is None:
            return None
        eps = self._check_noise("posterior_noise", eps, None)
        shape = (self.num_steps, *layout.lead, self.steering.num_samples, layout.action_dim)
        in_chunks = (*shape[:-1], *(layout.chunk or layout.action))
        if tuple(eps.shape) != shape and tuple(eps.shape) != in_chunks:  # not `in`: torch.compile misreads it
            in_words = ", ".join(["K", *("B" if len(layout.lead) == 1 else map(str, layout.lead)), "N", "A"])
            raise ValueError(
                f"posterior_noise has shape {list(eps.shape)}; expected {list(shape)} ([{in_words}])"
                + (f", or with {list(layout.chunk)} last." if layout.chunk else ".")
            )
        if eps.device != device:
            raise ValueError(f"posterior_noise is on {eps.device}, noise on {device}; expected one device.")
        return eps.to(dtype).reshape(self.num_steps, layout.rows, self.steering.num_samples, layout.action_dim)

    def _drawn(
        self, layout: Layout, kept: tuple[Tensor | None, Tensor | None], like: tuple[torch.device, torch.dtype],
        generator: torch.Generator | None, seeds: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """Start and posterior noise: what was given of them, and the rest drawn; and what selection="softmax" draws."""
        start, eps = kept
        rows, action_dim, steering = layout.rows, layout.action_dim, self.steering
        count = steering.num_candidates
        draws_eps = steering.draws_posterior and eps is None
        selects = count > 1 and steering.selection == "softmax"
        if seeds is None:
            if start is None:
                start = drawn((rows, count, action_dim), *like, generator)
            if draws_eps:
                eps = drawn((self.num_steps, rows, steering.num_samples, action_dim), *like, generator)
            return start, eps, drawn((rows, count), *like, generator) if selects else None
        if generator is not None:
            raise ValueError("both generator and seeds were given; expected one of them (seeds draws row by row).")
        if start is not None and not draws_eps and not selects:
            raise ValueError(
                "both noise and seeds were given, and nothing is left to draw; expected one of them (beside noise, "
                "seeds draws posterior_noise and the selection where a call needs them)."
            )
        # the start is drawn even where it was given: a seed's posterior noise is then the same beside any noise
        shapes: list[tuple[int, ...]] = [(count, action_dim)]
        shapes += [(self.num_steps, steering.num_samples, action_dim)] * draws_eps + [(count,)] * selects
        found = [value.to(*like) for value in drawn_by_row(read_seeds(seeds, rows), shapes)]
        start = found[0] if start is None else start
        return start, found[1].movedim(1, 0) if draws_eps else eps, found[-1] if selects else None


def _first(values: Iterable[Any], default: Any = None) -> Any:
    """As next() with a default, which torch.compile of 2.6 does not trace."""
    for value in values:
        return value
    return default


def reader_of(sampler: Any, networks: dict[str, Any]) -> Reader:
    """The reader of a SteeredSampler as it is now, for a call that asks these networks."""
    steering = sampler.steering
    packed = {name: net for name, net in networks.items() if isinstance(net, PackableNetwork)}
    asks = {name: steering.asks(name) or (name == "critic" and steering.needs_critic) for name in packed}
    asked = [net for name, net in packed.items() if asks[name]]
    recognised = (own.network for own in sampler._own.values() if own.network is not None)
    tells = _first((*asked, *packed.values(), *recognised))
    parameter = _first(sampler.parameters())
    device = torch.device("cpu") if parameter is None else parameter.device
    return Reader(
        steering, sampler.num_steps, tells, len(asked) > 0, device, sampler.chunk_shape,
        lambda: computes_float64(sampler), bounds_width(sampler.action_low, sampler.action_high),
    )  # fmt: skip
