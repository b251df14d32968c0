"""Calls at random: the shapes, strides, dtypes and values of what a sampler is called with, and what is done before."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from qpilots_fast import SteeredSampler
from tests.fuzz.samplers import Subject

LEADS = ((), (0,), (1,), (1,), (2,), (3,), (3,), (17,), (2, 3))
SCALES = (1.0, 1.0, 1.0, 0.0, 1e-20, 10.0, 1e4, 1e30)
ODD = (math.nan, math.inf, [1.0, 2.0], "text", None, torch.zeros(3, dtype=torch.int64), np.zeros((2, 1000)), {}, True)


def _every_second(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)
    wide[..., ::2] = x
    return wide[..., ::2]


STRIDES: dict[str, Callable[[Tensor], Any]] = {
    "contiguous": lambda x: x,
    "columns first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "every second column": _every_second,
    "one row for all": lambda x: x[:1].expand(x.shape) if x.ndim > 1 and len(x) else x,
    "an offset": lambda x: torch.cat([x.new_full((3,), math.nan), x.reshape(-1)])[3:].view(x.shape),
    "requires grad": lambda x: x.clone().requires_grad_(),
}
LAYOUTS = {
    **STRIDES,
    "float64": lambda x: x.double(),
    "float16": lambda x: x.clamp(-6e4, 6e4).half(),
    "bfloat16": lambda x: x.bfloat16(),
    "array": lambda x: x.numpy(),
    "array backwards": lambda x: np.ascontiguousarray(x.numpy()[..., ::-1])[..., ::-1],
    "array in Fortran order": lambda x: np.asfortranarray(x.numpy()),
    "array of float64": lambda x: x.double().numpy(),
    "array, big-endian": lambda x: x.numpy().astype(">f4"),
}

EDITS: dict[str, Callable[[SteeredSampler, torch.nn.Module], Any]] = {
    "nothing": lambda sampler, network: None,
    "weights in place": lambda sampler, network: [p.data.mul_(0.5) for p in network.parameters()],
    "weights in other memory": lambda sampler, network: [setattr(p, "data", p.data * 2) for p in network.parameters()],
    "freeze": lambda sampler, network: sampler.freeze(),
    "unfreeze": lambda sampler, network: sampler.unfreeze(),
    "state dict": lambda sampler, network: network.load_state_dict(
        {name: value * 0.75 if value.is_floating_point() else value for name, value in network.state_dict().items()}
    ),
}
CONTEXTS: dict[str, Callable[[], Any]] = {
    "nothing": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@dataclass(frozen=True)
class Call:
    """Arguments of one call, and what is done before it.

    Args:
        arguments: obs, noise, posterior_noise and more, by name. edit, context: keys of EDITS and CONTEXTS.
        odd: the arguments that are none.
        extreme: whether obs are far out, so that float32 may overflow.
    """

    arguments: dict[str, Any]
    edit: str
    context: str
    odd: frozenset[str] = field(default_factory=frozenset)
    extreme: bool = False

    def run(self, sampler: SteeredSampler, network: torch.nn.Module) -> Any:
        """network: of the sampler, that the edit is made to."""
        EDITS[self.edit](sampler, network)
        with CONTEXTS[self.context]():
            return sampler(**self.arguments)

    def exactly(self) -> Call:
        """The same values in float64."""
        return replace(self, arguments={k: _exactly(k, v) for k, v in self.arguments.items()}, context="nothing")


def _exactly(name: str, value: Any) -> Any:
    if name == "seeds":
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        value = torch.from_numpy(value.astype(np.float64))
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().float().double()  # what a float32 sampler reads of a float64 observation
    return value


def _laid_out(draw: Any, values: Tensor, layouts: dict[str, Callable[[Tensor], Any]]) -> Any:
    return layouts[draw(st.sampled_from(tuple(layouts)))](values)


@st.composite
def calls(draw: Any, subject: Subject, sampler: SteeredSampler) -> Call:
    """One call of a sampler made from this subject."""
    spec: Any = subject.first_network.spec
    rule, steps = subject.rule, sampler.num_steps
    lead = draw(st.sampled_from(LEADS))
    if subject.as_callables and len(lead) != 1:
        lead = (2,)  # callables read obs of any shape: B rows is what noise says
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scale = draw(st.sampled_from(SCALES))
    obs = scale * torch.randn(*lead, spec.obs_dim, generator=generator)
    layouts = STRIDES if subject.as_callables else LAYOUTS  # functions get the dtype that was given
    arguments = {"obs": _laid_out(draw, obs, layouts)}
    if subject.as_callables or draw(st.booleans()):  # callables do not tell how wide an action is
        candidates = (rule.num_candidates,) if rule.num_candidates > 1 and draw(st.booleans()) else ()
        noise = torch.randn(*lead, *candidates, spec.action_dim, generator=generator)
        arguments["noise"] = _laid_out(draw, noise, layouts)
    if rule.draws_posterior and draw(st.booleans()):
        shape = (steps, *lead, rule.num_samples, spec.action_dim)
        arguments["posterior_noise"] = torch.randn(shape, generator=generator)
    open_draws = rule.draws_posterior and "posterior_noise" not in arguments
    if "noise" not in arguments or open_draws or (rule.num_candidates > 1 and rule.selection == "softmax"):
        arguments["seeds"] = list(range(math.prod(lead)))
    odd = set()
    if draw(st.integers(1, 6)) == 1:
        arguments["alpha"] = torch.rand(lead, generator=generator)
        odd |= set() if rule.steers else {"alpha"}
    if draw(st.integers(1, 6)) == 1:
        arguments["return_info"] = True
    if draw(st.integers(1, 12)) == 1:
        names = ("noise", "posterior_noise", "seeds", "alpha", "generator", "obs")
        name = draw(st.sampled_from(names[:-1] if subject.as_callables else names))  # callables read any obs
        arguments[name] = draw(st.sampled_from(ODD))
        odd.add(name)
    contexts = tuple(c for c in CONTEXTS if c != "autocast" or not subject.as_callables)
    return Call(
        arguments, draw(st.sampled_from(tuple(EDITS))), draw(st.sampled_from(contexts)), frozenset(odd), scale >= 1e4
    )
