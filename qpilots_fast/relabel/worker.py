"""What one worker does: its own frozen sampler, and a part of the data's rows after the other."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..finish import Finish
from ..inputs import Inputs, Layout, reader_of
from ..reference import aggregate
from ..sampler import SteeredSampler
from ..steering import Steering
from .rows import ACTION_KEYS, Reasons, Source, open_source
from .store import Part, Relabelled, Store


@dataclass(frozen=True)
class Job:
    """What every worker is told. function: FILE.py:FUNCTION; batch_size: rows of one call of the sampler."""

    data: str
    out: str
    function: str
    obs_key: str
    batch_size: int
    seed: int


def load_sampler(function: str) -> SteeredSampler:
    """What FILE.py:FUNCTION returns when it is called.

    Raises:
        ValueError, TypeError: where there is no such function, or it returns something else.
    """
    file, _, name = function.rpartition(":")
    path = Path(file)
    if not file or not name or not path.is_file():
        raise ValueError(f"--sampler is {function}; expected FILE.py:FUNCTION, a file that exists and its function.")
    spec = importlib.util.spec_from_file_location(f"_relabelled_by_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--sampler is {function}; expected a Python file, FILE.py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look it up
    sys.path.insert(0, str(path.resolve().parent))  # as `python FILE.py` does
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{path} has no function {name}; expected one that returns a SteeredSampler.")
    sampler = getattr(module, name)()
    if not isinstance(sampler, SteeredSampler):
        raise TypeError(f"{function}() returned {type(sampler).__name__}; expected a SteeredSampler.")
    if sampler.critic is None:
        raise ValueError(f"the sampler of {function} has no critic; expected one, whose values are written.")
    return sampler


def fingerprint(sampler: SteeredSampler) -> str:
    """A digest of a sampler's settings and of all that its state_dict holds."""
    digest = hashlib.sha256(sampler.extra_repr().removesuffix(", frozen").encode())
    bounds = (sampler.action_low, sampler.action_high, sampler.time_grid, sampler.chunk_shape)
    digest.update(repr([b.tolist() if isinstance(b, (Tensor, np.ndarray)) else b for b in bounds]).encode())
    for name, value in sampler.state_dict().items():
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Worker:
    """Relabels parts. The sampler is made at the first one, so that what goes wrong there is that part's error."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._made: _Sampling | None = None

    def __call__(self, part: Part, told: Callable[[int], None] = lambda rows: None) -> int:
        """Writes the part, unless it is there; told(n) after every n rows. Returns the part's number."""
        store = Store(Path(self.job.out))
        if not store.has(part):
            if self._made is None:
                sampler = load_sampler(self.job.function)
                store.claim_sampler(fingerprint(sampler), self.job.function)
                self._made = _Sampling(self.job, sampler)
            store.write(part, self._made.relabelled(part, told))
        return part.index


class _Sampling:
    """One sampler at work on one data set."""

    def __init__(self, job: Job, sampler: SteeredSampler) -> None:
        self._job = job
        self._source: Source = open_source(Path(job.data), job.obs_key)
        self._sampler = sampler.freeze()
        self._base = SteeredSampler(
            sampler.flow, sampler.critic, Steering.unsteered(), num_steps=sampler.num_steps, backend=sampler.backend,
            precision=sampler.precision, action_low=sampler.action_low, action_high=sampler.action_high,
            critic_layout=sampler.critic_layout, chunk_shape=sampler.chunk_shape, time_grid=sampler.time_grid,
        ).freeze()  # fmt: skip
        reader = reader_of(sampler, sampler.networks)
        wide = (reader.packed.spec.obs_dim,) if reader.packed is not None and reader.reads_obs else None
        self._obs_shape = wide or self._source.shape_of(job.obs_key)
        self._device = reader.device
        self._own = next((key for key in ACTION_KEYS if key in self._source.columns), None)
        self._own_shape = self._source.shape_of(self._own) if self._own else ()
        width, found = reader.action_dim, int(np.prod(self._own_shape))
        if self._own and width not in (None, found):
            fits = sampler.chunk_shape or (width,)
            self._own_shape = fits if len(fits) == len(self._own_shape) else (int(width or 0),)

    def relabelled(self, part: Part, told: Callable[[int], None]) -> Relabelled:
        """The part's rows, those set aside with the reason."""
        rows = (part.start, part.stop)
        obs, reasons = self._source.read(self._job.obs_key, *rows, self._obs_shape)
        own = None
        if self._own is not None:
            own, more = self._source.read(self._own, *rows, self._own_shape)
            reasons = {**more, **reasons}
        good = np.array([i for i in range(len(obs)) if i not in reasons], np.int64)
        made, refusals = [], list[ValueError]()
        told(len(obs) - len(good))
        for first in range(0, len(good), self._job.batch_size):
            batch = good[first : first + self._job.batch_size]
            made += self._sampled(part, obs, own, batch, reasons, refusals)
            told(len(batch))
        if refusals and not made:  # not one row went through: it is not the rows
            raise refusals[0]
        kept = [np.concatenate([piece[column] for piece in made]) if made else None for column in range(4)]
        return Relabelled(kept, {part.start + row: reason for row, reason in sorted(reasons.items())})

    def _sampled(
        self, part: Part, obs: np.ndarray, own: Any, batch: np.ndarray, reasons: Reasons, refusals: list[ValueError]
    ) -> list[tuple[np.ndarray, ...]]:
        """(row_id, actions, q_before, q_after) of a batch; of each row alone where the sampler refuses some."""
        try:
            actions, before, after = self._call(part.start + batch, obs[batch], None if own is None else own[batch])
        except ValueError as error:
            if len(batch) == 1:
                reasons[int(batch[0])] = f"the sampler refuses it: {error}"
                refusals.append(error)
                return []
            alone = [self._sampled(part, obs, own, batch[i : i + 1], reasons, refusals) for i in range(len(batch))]
            return [piece for pieces in alone for piece in pieces]
        finite = np.isfinite(before) & np.isfinite(after)
        for row in batch[~finite]:
            reasons[int(row)] = "the critic's value of its action is not finite"
        return [((part.start + batch)[finite], actions[finite], before[finite], after[finite])]

    def _call(self, ids: np.ndarray, obs: np.ndarray, own: np.ndarray | None) -> tuple[np.ndarray, ...]:
        seeds = [self._job.seed + int(i) for i in ids]
        at = torch.from_numpy(obs).to(self._device)
        actions = self._sampler(at, seeds=seeds)
        if own is None:
            before = self._base(at, seeds=seeds)
        else:
            before = torch.from_numpy(own).to(actions.device, actions.dtype)
        return _numpy(actions), self._value(at, before), self._value(at, actions)

    def _value(self, obs: Tensor, actions: Tensor) -> np.ndarray:
        """Qbar [B] as the steering aggregates."""
        sampler, steering = self._sampler, self._sampler.steering
        flat = actions.flatten(1)
        chunk = sampler.chunk_shape
        inputs = Inputs(obs.to(flat.dtype), flat.unsqueeze(1), None, Layout((len(flat),), actions.shape[1:], chunk))
        one = replace(steering, num_candidates=1, final_steps=0)
        critic = sampler.networks["critic"]
        finish = Finish(critic, one, sampler.precision, sampler.backend, sampler.critic_layout)
        with torch.no_grad():
            values = finish.values(inputs, flat)
            # each row's members side by side: torch then adds them up in one order in every batch
            return _numpy(aggregate(values.t().contiguous().t(), steering.aggregation, steering.rho))


def _numpy(value: Tensor) -> np.ndarray:
    return value.to("cpu", torch.float32).numpy()
