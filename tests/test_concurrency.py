"""The guarantees of docs/reliability.md for threads, forks and interrupts."""

from __future__ import annotations

import copy
import signal
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch

from qpilots_fast import SteeredSampler, Steering
from qpilots_fast.testing import Case, make_case
from tests.marks import needs_cpu
from tests.test_edits import _together

SECONDS = 0.7
THREADS = 8
ATTEMPTS = 60  # interrupts, spread over as long as the calls take


@pytest.fixture(params=[Steering.qpilots_u(), Steering.qpilots_m(num_samples=2)], ids=["U", "M"])
def case(request) -> Case:
    return make_case(request.param, batch_size=3, num_steps=3)


def _call(sampler: SteeredSampler, case: Case) -> torch.Tensor:
    return sampler(case.obs, case.noise, case.posterior_noise)


def _seconds(work: Callable[[SteeredSampler], None], sampler: SteeredSampler) -> float:
    began = time.perf_counter()
    work(sampler)
    return time.perf_counter() - began


def _while_others_call(
    case: Case, samplers: list[SteeredSampler], change: Callable[[int], None], allowed: list[torch.Tensor],
    refusals: tuple[type[Exception], ...] = (),
) -> None:  # fmt: skip
    """Eight threads call while another changes something; each answer must be one of those allowed, whole."""
    end, wrong = time.monotonic() + SECONDS, []

    def calling(sampler: SteeredSampler) -> None:
        while time.monotonic() < end:
            try:
                actions = _call(sampler, case)
            except refusals:
                continue
            if not any(torch.equal(actions, one) for one in allowed):
                wrong.append(actions)

    def changing() -> None:
        count = 0
        while time.monotonic() < end:
            change(count := count + 1)

    callers = [partial(calling, samplers[i % len(samplers)]) for i in range(THREADS)]
    _together(*callers, changing)
    assert not wrong, wrong[0]


@pytest.mark.parametrize("samplers", [1, THREADS], ids=["one sampler", "eight samplers"])
def test_a_swapped_network_is_seen_whole(case, backend, samplers):
    made = [case.sampler(backend) for _ in range(samplers)]
    critics = [case.critic, copy.deepcopy(case.critic)]
    with torch.no_grad():
        critics[1].weights[-1].neg_()
    allowed = []
    for critic in critics:
        made[0].critic = critic
        allowed.append(_call(made[0], case))
    assert not torch.equal(*allowed)

    def swap(count: int) -> None:
        for sampler in made:
            sampler.critic = critics[count % 2]

    _while_others_call(case, made, swap, allowed)


@pytest.mark.parametrize("samplers", [1, THREADS], ids=["one sampler", "eight samplers"])
def test_weights_written_in_place_are_all_seen_afterwards(case, backend, samplers):
    """During a write a call may see some of it, as torch's own forward would; the call after it sees all."""
    made = [case.sampler(backend) for _ in range(samplers)]
    stop = threading.Event()
    wrong: list[str] = []

    def calling(sampler: SteeredSampler) -> None:
        while not stop.is_set():
            actions = _call(sampler, case)
            if not bool(actions.isfinite().all()) or float(actions.abs().max()) > 1:
                wrong.append(f"{actions}")

    def writing() -> None:
        generator = torch.Generator().manual_seed(0)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            with torch.no_grad():
                for parameter in case.critic.parameters():
                    parameter.mul_(1 + 0.01 * float(torch.randn((), generator=generator)))
            own = _call(made[0], case)  # this thread's writes are done: its call sees them all
            fresh = _call(case.sampler(backend), case)
            if not torch.equal(own, fresh):
                wrong.append("old weights after a write")
        stop.set()

    _together(*[partial(calling, made[i % samplers]) for i in range(THREADS)], writing)
    assert not wrong, wrong[0]


def test_freezing_and_another_backend_meanwhile(case):
    sampler = case.sampler("auto")
    allowed = []
    for name in ("auto", "reference"):
        sampler.backend = name
        allowed.append(_call(sampler, case))

    def change(count: int) -> None:
        sampler.backend = ("auto", "reference")[count % 2]
        sampler.freeze() if count % 3 else sampler.unfreeze()
        sampler.to("cpu")

    _while_others_call(case, [sampler], change, allowed)


def test_another_dtype_meanwhile(case):
    """`.to(float64)` converts parameter by parameter, as for any nn.Module: a call may be refused meanwhile."""
    sampler = case.sampler("reference")
    expected = _call(sampler, case)
    end = time.monotonic() + SECONDS

    def calling() -> None:
        while time.monotonic() < end:
            try:
                assert bool(_call(sampler, case).isfinite().all())
            except (ValueError, TypeError, RuntimeError):
                continue

    def converting() -> None:
        while time.monotonic() < end:
            sampler.double()
            sampler.float()

    _together(*[calling] * 4, converting)
    assert torch.equal(_call(sampler, case), expected)


@needs_cpu
@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timer here")
@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_an_interrupt_anywhere_leaves_a_sampler_that_works(case, frozen):
    """Ctrl-C at moments spread over a first call (which packs) and later ones."""
    expected = _call(case.sampler("cpu"), case)

    def fresh() -> SteeredSampler:
        sampler = case.sampler("cpu")
        return sampler.freeze() if frozen else sampler

    def calls(sampler: SteeredSampler) -> None:
        for _ in range(3):
            _call(sampler, case)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    longest = min(_seconds(calls, fresh()) for _ in range(5))  # on this machine
    before = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for attempt in range(ATTEMPTS):
            sampler = fresh()
            try:
                signal.setitimer(signal.ITIMER_REAL, longest * (1 + attempt) / ATTEMPTS)
                calls(sampler)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                # one that falls between the bytecodes of torch's own `no_grad` leaves gradients off, in any torch code
                torch.set_grad_enabled(True)
                interrupted += 1
            assert torch.equal(_call(sampler, case), expected), attempt
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > ATTEMPTS / 4
