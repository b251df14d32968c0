"""Samplers at random: networks of every kind that can be given, and every setting, some of them out of range."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

from qpilots_fast import CriticEnsemble, FlowMLP, MetaFlowMap, SteeredSampler, Steering, from_module
from qpilots_fast.steering import AGGREGATIONS, CLIPS, ESTIMATES, JACOBIANS, SCALES, SELECTIONS
from qpilots_fast.testing import BETWEEN_LAYERS
from tests.zoo.critics import CRITICS
from tests.zoo.entries import A as ZOO_ACTION
from tests.zoo.entries import Entry
from tests.zoo.entries import S as ZOO_OBS
from tests.zoo.flows import FLOWS

NETWORKS = ("flow", "critic", "posterior")
# of what a setting may be set to by mistake
ODD = (None, -1, 0, True, "2", math.nan, math.inf, 1e300, [], (1.0,), np.float32(0.5), np.int64(3), torch.tensor(0.25))


@dataclass(frozen=True)
class Subject:
    """What a sampler is made from.

    Args:
        networks: by their argument's name; None where there is none.
        as_callables: the names of those that are given as functions.
        steering, settings: keyword arguments of Steering and SteeredSampler.
        odd: the settings that were drawn out of their range, or that may not go together.
    """

    networks: dict[str, nn.Module | None]
    as_callables: frozenset[str]
    steering: dict[str, Any]
    settings: dict[str, Any]
    odd: frozenset[str]

    def sampler(self, backend: str, precision: str | None = None) -> SteeredSampler:
        """The sampler; raises what its constructors raise."""
        given = {
            name: _function(name, network) if name in self.as_callables and network is not None else network
            for name, network in self.networks.items()
        }
        settings = self.settings if precision is None else self.settings | {"precision": precision}
        return SteeredSampler(**given, steering=self.rule, backend=backend, **settings)

    @property
    def rule(self) -> Steering:
        """The steering; raises where it is none."""
        return Steering(**self.steering)

    def exactly(self) -> Subject:
        """The same values in float64."""
        networks = {k: None if n is None else copy.deepcopy(n).double() for k, n in self.networks.items()}
        return replace(self, networks=networks)

    @property
    def first_network(self) -> nn.Module:
        network = self.networks["flow"]
        assert network is not None
        return network


def _function(kind: str, network: nn.Module) -> Callable[..., torch.Tensor]:
    """The network as a function of a user's, that is shown chunks where the sampler has a chunk_shape."""

    def function(obs: Any, *inputs: Any) -> torch.Tensor:
        flat = [value.flatten(1) if value.ndim == 3 else value for value in inputs]
        result = network(obs, *flat[: 1 if kind == "critic" else 3])  # a critic's time is left out
        return result.view_as(inputs[0]) if result.shape == flat[0].shape else result

    return function


def _sometimes(draw: Any, odds: int) -> bool:
    return draw(st.integers(1, odds)) == 1


@cache
def _packed(entry: Entry) -> nn.Module:
    torch.manual_seed(1)
    return from_module(entry.build().eval(), entry.kind, obs_dim=ZOO_OBS, action_dim=ZOO_ACTION, **entry.hints)


def _from_zoo(draw: Any, entries: tuple[Entry, ...]) -> nn.Module:
    return copy.deepcopy(_packed(draw(st.sampled_from([e for e in entries if not e.refused]))))


@st.composite
def _own_network(draw: Any, kind: str, obs_dim: int, action_dim: int) -> nn.Module:
    """A FlowMLP, CriticEnsemble or MetaFlowMap, its norms away from 1 and 0."""
    # few units under a LayerNorm are close to a sign function, which float32 cannot follow whoever computes it
    hidden = draw(st.lists(st.sampled_from((1, 7, 16, 33)), min_size=1, max_size=3))
    norms = [draw(st.sampled_from((None, "pre", "post"))) if width >= 7 else None for width in hidden]
    options: dict[str, Any] = {"activation": draw(st.sampled_from(BETWEEN_LAYERS)), "layer_norm": norms}
    if kind == "critic":
        network: nn.Module = CriticEnsemble(obs_dim, action_dim, draw(st.integers(1, 4)), hidden, **options)
    else:
        options["time_embedding"] = draw(st.sampled_from(("raw", "sinusoidal", "fourier")))
        network = {"flow": FlowMLP, "posterior": MetaFlowMap}[kind](obs_dim, action_dim, hidden, **options)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return network


@st.composite
def _steering(draw: Any, action_dim: int, num_steps: int) -> tuple[dict[str, Any], set[str]]:
    """Settings of Steering, and what of them does not go together."""
    number = st.sampled_from((0.0, 1e-3, 0.2, 1.0, 30.0))
    some = {
        "alpha": number, "estimate": st.sampled_from(ESTIMATES), "jacobian": st.sampled_from(JACOBIANS),
        "clip": st.sampled_from(CLIPS), "aggregation": st.sampled_from(AGGREGATIONS),
        "scale": st.sampled_from(SCALES), "rho": number, "tau": st.sampled_from((1e-2, 1.0, 20.0)),
        "steer_first_step": st.booleans(), "num_samples": st.integers(1, 3), "glass_steps": st.integers(1, 3),
        "q_scale": st.sampled_from((None, "batch_std", 3.0)), "num_candidates": st.integers(1, 3),
        "selection": st.sampled_from(SELECTIONS), "final_steps": st.integers(0, 2),
        "max_disagreement": st.sampled_from((None, 0.0, 0.1, 10.0)), "eps": st.sampled_from((1e-8, 1e-2)),
        "step_weights": st.tuples(*[st.sampled_from((0.0, 0.5, 1.0))] * num_steps),
        "window": st.sampled_from(((0.0, 0.5), (0.3, 2.0))), "critic_time": st.just(True),
        "steered_dims": st.sets(st.integers(0, action_dim - 1), min_size=1).map(lambda dims: tuple(sorted(dims))),
        "max_grad_norm": st.sampled_from((0.1, 10.0)), "final_step_size": st.sampled_from((1e-3, 0.1)),
    }  # fmt: skip
    names = draw(st.sets(st.sampled_from(sorted(some)), max_size=8))
    chosen = {name: draw(some[name]) for name in sorted(names)}
    odd = set()
    estimate = chosen.get("estimate", "tweedie")
    if estimate in ("mfm", "glass"):
        chosen.pop("jacobian", None)
    elif not _sometimes(draw, 20):
        chosen.pop("num_samples", None)
    if chosen.get("num_samples", 1) > 1 and estimate not in ("mfm", "glass"):
        odd.add("num_samples")
    if "window" in chosen and "step_weights" in chosen:
        odd.add("window")
    if "critic_time" in chosen and not (estimate == "noisy" or _sometimes(draw, 20)):
        chosen.pop("critic_time")
    if "critic_time" in chosen:
        odd.add("critic_time")
    if _sometimes(draw, 12):
        name = draw(st.sampled_from(sorted(some)))
        chosen[name] = draw(st.sampled_from(ODD))
        odd.add(name)
    return chosen, odd


@st.composite
def _settings(draw: Any, action_dim: int, num_steps: int) -> tuple[dict[str, Any], set[str]]:
    settings: dict[str, Any] = {"num_steps": num_steps}
    odd = set()
    if _sometimes(draw, 4):
        inner = sorted(draw(st.sets(st.sampled_from((0.01, 0.25, 0.5, 0.9, 0.999)), max_size=num_steps - 1)))
        settings["time_grid"] = [0.0, *inner, 1.0]
        settings["num_steps"] = len(inner) + 1
    bounds = draw(st.sampled_from(("default", "none", "narrow", "each", "infinite", "wide")))
    if bounds != "default":
        low, high = {
            "none": (None, None), "narrow": (-0.1, 0.2), "infinite": (-math.inf, 0.5), "wide": (-1e4, 1e4),
            "each": ([-0.5] * action_dim, np.linspace(0.1, 2.0, action_dim)),
        }[bounds]  # fmt: skip
        settings |= {"action_low": low, "action_high": high}
    if _sometimes(draw, 8):
        settings["precision"] = draw(st.sampled_from(("bfloat16", "bfloat16", "float64", "float16", "tf32")))
        odd |= {"precision"} if settings["precision"] in ("float16", "tf32") else set()
    if _sometimes(draw, 8) and action_dim % 2 == 0:
        settings["chunk_shape"] = (2, action_dim // 2)
    if _sometimes(draw, 20):
        name = draw(st.sampled_from(("num_steps", "action_low", "action_high", "precision", "critic_layout",
                                     "chunk_shape", "time_grid")))  # fmt: skip
        settings[name] = draw(st.sampled_from(ODD))
        odd.add(name)
    return settings, odd


@st.composite
def subjects(draw: Any) -> Subject:
    """Everything about a sampler; torch's generator, seeded by a draw, fills the weights."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    zoo = draw(st.sampled_from((None, None, None, "flow", "critic", "both")))
    obs_dim, action_dim = (ZOO_OBS, ZOO_ACTION) if zoo else (draw(st.integers(0, 9)), draw(st.integers(1, 6)))
    num_steps = draw(st.integers(1, 3))
    steering, odd = draw(_steering(action_dim, num_steps))
    settings, more_odd = draw(_settings(action_dim, num_steps))
    if settings.get("precision") in ("bfloat16", "float16"):
        steering.pop("num_candidates", None)  # which of two candidates is better may lie below 16 bits
    weights = steering.get("step_weights")
    if isinstance(weights, tuple) and len(weights) != settings["num_steps"]:
        odd.add("step_weights")
    networks: dict[str, nn.Module | None] = {
        "flow": _from_zoo(draw, FLOWS) if zoo in ("flow", "both") else draw(_own_network("flow", obs_dim, action_dim)),
        "critic": _from_zoo(draw, CRITICS) if zoo in ("critic", "both") else draw(
            _own_network("critic", obs_dim, action_dim)
        ),
        "posterior": None if steering.get("estimate") != "mfm" else draw(
            _own_network("posterior", obs_dim, action_dim)
        ),
    }  # fmt: skip
    scale = draw(st.sampled_from((1.0, 1.0, 1.0, 0.0, 1e-12, 4.0, 1e4)))
    if scale != 1.0:
        with torch.no_grad():
            for parameter in networks[draw(st.sampled_from(("flow", "critic")))].parameters():  # type: ignore[union-attr]
                parameter.mul_(scale)
    callables = frozenset(draw(st.sets(st.sampled_from(NETWORKS), min_size=1))) if _sometimes(draw, 6) else frozenset()
    return Subject(networks, callables, steering, settings, frozenset(odd | more_odd))
