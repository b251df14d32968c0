"""Whether a sampler's answer is right: the float64 reference's within the precision's tolerance, or a clear refusal."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import qpilots_fast
from qpilots_fast import BackendUnavailable, SteeredSampler
from qpilots_fast.testing import TOLERANCES
from tests.fuzz.calls import Call
from tests.fuzz.ledger import TOLERATED
from tests.fuzz.samplers import Subject

PACKAGE = str(Path(qpilots_fast.__file__).parent)
REFUSALS = (ValueError, TypeError, BackendUnavailable)
# relative moves of weights and inputs that a row must stand: a few dozen roundings, as a sum of as many terms makes
MOVES = {"float32": 2.0**-18, "bfloat16": 2.0**-8, "float64": 2.0**-40}
TRIES = 12
# of one action in bfloat16, where testing.TOLERANCES bounds the mean alone
ROW_BFLOAT16 = 0.05


class Finding(AssertionError):
    """An answer that is neither right nor a documented refusal."""


@dataclass
class Tally:
    """What a run met. sampled: calls compared; refused: by the exception's first words; tolerated: by ledger entry."""

    calls: int = 0
    sampled: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    tolerated: Counter[str] = field(default_factory=Counter)

    def tolerate(self, entry: str) -> None:
        assert entry in TOLERATED, entry
        self.tolerated[entry] += 1


def _check_refusal(error: Exception, what: str) -> None:
    """A documented exception: of the package's own, in words."""
    if not isinstance(error, REFUSALS):
        raise Finding(f"{what} raised {type(error).__name__}: {error}") from error
    last = traceback.extract_tb(error.__traceback__)[-1]
    if not last.filename.startswith(PACKAGE):
        raise Finding(f"{what} raised inside {last.filename}:{last.lineno}: {error}") from error
    if len(str(error)) < 25:
        raise Finding(f"{what} raised without a word of what to do: {error!r}") from error


def _outcome(run: Any) -> Any:
    try:
        return run()
    except Exception as error:
        return error


class Judge:
    """Holds every call of one sampler to the reference."""

    def __init__(self, subject: Subject, backend: str, tally: Tally) -> None:
        self.subject, self.tally = subject, tally
        self.exact = subject.exactly()
        self.sampler = _outcome(lambda: subject.sampler(backend))
        self.reference = _outcome(lambda: self.exact.sampler("reference", self._exact_precision()))

    def _exact_precision(self) -> str | None:
        """float64 in the place of any precision that is one."""
        precision = self.subject.settings.get("precision", "float32")
        return "float64" if isinstance(precision, str) and precision in qpilots_fast.spec.PRECISIONS else None

    def made(self) -> bool:
        """Whether there is a sampler to call; checks the refusal where there is none."""
        if not isinstance(self.sampler, Exception):
            return True
        self._refused(self.sampler, self.reference, self.subject.odd, "the constructor", False)
        return False

    def __call__(self, call: Call) -> None:
        """Makes the call on the backend and on the reference, and compares."""
        self.tally.calls += 1
        got = _outcome(lambda: call.run(self.sampler, self.subject.first_network))
        exactly = call.exactly()
        expected = self.reference
        if isinstance(expected, SteeredSampler):
            expected = _outcome(lambda: exactly.run(self.reference, self.exact.first_network))
        extreme = call.extreme or self._has_large_weights()
        if isinstance(got, Exception):
            self._refused(got, expected, call.odd | self.subject.odd, "the call", extreme)
            return
        if isinstance(expected, Exception):
            raise Finding(f"sampled where the float64 reference raises {expected!r}") from expected
        if call.arguments.get("return_info"):
            (got, info), (expected, _) = got, expected
            self._check_info(info, extreme)
        self._check_actions(got, expected, exactly, extreme)
        self.tally.sampled += 1

    def _refused(self, error: Exception, expected: Any, odd: frozenset[str], what: str, extreme: bool) -> None:
        _check_refusal(error, what)
        self.tally.refused[" ".join(str(error).split()[:4])] += 1
        if isinstance(error, BackendUnavailable) or "computes in float32" in str(error):
            return  # what one backend refuses, and says which takes it
        if not isinstance(expected, Exception):
            if extreme and "not finite" in str(error):
                self.tally.tolerate("beyond float32")
                return
            raise Finding(f"{what} raised where the float64 reference does not: {error}") from error
        if not odd and not (extreme and "finite" in str(error)):
            raise Finding(f"{what} refused what is in range: {error}") from error

    def _has_large_weights(self) -> bool:
        found = [p for n in self.subject.networks.values() if n is not None for p in n.parameters() if p.numel()]
        return any(p.detach().abs().max() > 100 for p in found)

    @staticmethod
    def _check_info(info: Any, extreme: bool) -> None:
        rows = info.gradient_norms.shape[1:]
        for name in ("gradient_norms", "nonfinite", "q_std", "gated"):
            value = getattr(info, name)
            if bool(value.isnan().any()) or not (extreme or bool(value.isfinite().all())):
                raise Finding(f"SampleInfo.{name} is not finite: {value}")  # the square of 1e30 is inf, never NaN
        if info.q_values is not None and info.q_values.shape[1:] != rows:
            raise Finding(f"SampleInfo.q_values is {list(info.q_values.shape)}; expected [E] and then {list(rows)}")

    # ------------------------------------------------------------ actions

    def _check_actions(self, got: Tensor, expected: Tensor, call: Call, extreme: bool) -> None:
        if got.shape != expected.shape or got.requires_grad:
            raise Finding(f"actions {list(got.shape)}, expected {list(expected.shape)}; grad {got.requires_grad}")
        if not got.numel():
            return
        if not bool(got.isfinite().all()):
            raise Finding(f"actions are not finite: {got}")
        for name, beyond in (("action_low", torch.lt), ("action_high", torch.gt)):
            bound = self._bound(name, got)
            if bound is not None and bool(beyond(got, bound).any()):
                raise Finding(f"actions are beyond {name}={bound}: {got}")
        error = (got.double() - expected).abs() / expected.abs().clamp(min=1)
        if not bool((error > self._tolerance()).any()) and self._mean_passes(error):
            return
        self._explain(error, expected, call, extreme)

    def _bound(self, name: str, like: Tensor) -> Tensor | None:
        bound = self.subject.settings.get(name, -1.0 if name == "action_low" else 1.0)
        if bound is None:
            return None
        bound = torch.as_tensor(np.asarray(bound), dtype=like.dtype)
        return bound if bound.ndim == 0 or like.shape[-1:] == bound.shape else bound.view(like.shape[-2:])

    @property
    def _precision(self) -> str:
        return str(self.subject.settings.get("precision", "float32"))

    def _tolerance(self) -> float:
        tolerance = TOLERANCES.get(self._precision, TOLERANCES["float32"])
        return tolerance.max_error or ROW_BFLOAT16

    def _mean_passes(self, error: Tensor) -> bool:
        tolerance = TOLERANCES.get(self._precision)
        return self._precision == "float32" or not tolerance or error.mean().item() <= (tolerance.mean_error or 1)

    def _explain(self, error: Tensor, expected: Tensor, call: Call, extreme: bool) -> None:
        """Tolerates an error that the ledger explains; raises else."""
        spread = torch.zeros_like(error)
        for attempt in range(TRIES):
            moved = self._moved(call, attempt)
            if moved is not None:
                spread = torch.maximum(spread, (moved - expected).abs() / expected.abs().clamp(min=1))
        wrong = (error > self._tolerance()) & (error > 2 * spread.amax(-1, keepdim=True))
        if not bool(wrong.any()) and (self._mean_passes(error) or error.mean() <= 2 * spread.mean()):
            self.tally.tolerate("ill-conditioned")
            return
        own = self._own_precision(call)
        if own is not None and error.max() <= 4 * ((own.double() - expected).abs() / expected.abs().clamp(min=1)).max():
            self.tally.tolerate("float32's own error")
            return
        if extreme and own is None:  # the reference raises there that a velocity is not finite
            self.tally.tolerate("beyond float32")
            return
        row = int(error.flatten(0, -2).amax(-1).argmax()) if error.ndim > 1 else 0
        raise Finding(
            f"{self._precision}: error {error.max():.1e}, mean {error.mean():.1e} in row {row}; moved by "
            f"{MOVES.get(self._precision, MOVES['float32']):.0e} the reference moves by {spread.max():.1e}"
        )

    def _moved(self, call: Call, seed: int) -> Tensor | None:
        """The reference's actions where every weight and input has moved a little."""
        generator = torch.Generator().manual_seed(seed)
        by = MOVES.get(self._precision, MOVES["float32"])

        def move(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return value * (1 + by * torch.randn(value.shape, generator=generator, dtype=value.dtype))

        held = _frozen_or_live(self.exact.networks)
        kept = [p.data.clone() for p in held]
        for parameter in held:
            parameter.data.copy_(move(parameter.data))
        try:
            sampler = self.exact.sampler("reference", self._exact_precision())
            result = _outcome(lambda: sampler(**{k: move(v) for k, v in call.arguments.items()}))
        finally:
            for parameter, values in zip(held, kept):
                parameter.data.copy_(values)
        if isinstance(result, Exception):
            return None
        return result[0] if call.arguments.get("return_info") else result

    def _own_precision(self, call: Call) -> Tensor | None:
        """The reference in the sampler's own precision."""
        arguments = {
            k: v.float() if isinstance(v, Tensor) and v.dtype == torch.float64 else v for k, v in call.arguments.items()
        }
        sampler = _outcome(lambda: self.subject.sampler("reference"))
        result = sampler if isinstance(sampler, Exception) else _outcome(lambda: sampler(**arguments))
        if isinstance(result, Exception):
            return None
        return result[0] if call.arguments.get("return_info") else result


def _frozen_or_live(networks: dict[str, nn.Module | None]) -> list[Tensor]:
    return [p for n in networks.values() if n is not None for p in n.parameters()]
