"""Live weights that the kernel watches for writes: every way of writing must be seen by the next call."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from qpilots_fast import CriticEnsemble, FlowMLP, SteeredSampler, Steering, backends
from qpilots_fast.backends import Call, native
from qpilots_fast.backends.cpu import CpuBackend

if native.import_failure() is not None:
    pytest.skip(native.import_failure(), allow_module_level=True)
REFUSAL = native.load_module().cpu_write_watch_unavailable()
needs_watch = pytest.mark.skipif(bool(REFUSAL), reason=f"no write watch here: {REFUSAL}")

OBS, ACTION, WIDTH, BATCH = 7, 3, 256, 3
CALLS_UNTIL_WATCHED = 5  # one that packs, three that find nothing new, and the one that protects


class Setup:
    """A critic of 3 x (256 x 256) hidden weights in one allocation of 0.8 MB a layer, and what a call needs."""

    def __init__(self, precision: str = "float32", critic: CriticEnsemble | None = None) -> None:
        torch.manual_seed(0)
        self.flow = FlowMLP(OBS, ACTION, (32,))
        self.critic = critic or CriticEnsemble(OBS, ACTION, 3, (WIDTH,) * 4)
        self.sampler = SteeredSampler(
            self.flow, self.critic, Steering.qpilots_u(), num_steps=3, backend="cpu", precision=precision
        )
        generator = torch.Generator().manual_seed(1)
        self.inputs = (torch.randn(BATCH, OBS, generator=generator), torch.randn(BATCH, ACTION, generator=generator))

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return self.sampler(*self.inputs)

    def fresh(self) -> Tensor:
        """What a sampler without any memory of earlier calls gives."""
        spec, networks = self.sampler._run.spec, self.sampler._run.bound()
        return CpuBackend().sample(Call(spec, networks, *self.inputs, None)).actions

    def watched(self, calls: int = CALLS_UNTIL_WATCHED) -> Setup:
        for _ in range(calls):
            self()
        assert self.status() == "watching"
        return self

    def status(self) -> str:
        backend = backends.get("cpu")
        plan = backend._get_plan(self.sampler._run.spec)
        return backend._get_sources(plan, self.sampler._run.bound())[1].watch_status

    @property
    def weight(self) -> Tensor:
        """[E, 256, 256], a hidden layer."""
        return self.critic.weights[2].data


def whole_pages(tensor: Tensor) -> tuple[int, int]:
    page = mmap.PAGESIZE
    begin = -(-tensor.data_ptr() // page) * page
    return begin, (tensor.data_ptr() + tensor.nbytes) // page * page - begin


def optimiser_step(s: Setup) -> None:
    for parameter in s.critic.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(s.critic.parameters(), lr=0.01).step()


def load_state(s: Setup) -> None:
    s.critic.load_state_dict({name: 0.9 * value for name, value in s.critic.state_dict().items()})


def numpy_element(index: tuple[int, int, int]) -> Callable[[Setup], None]:
    def write(s: Setup) -> None:
        s.weight.numpy()[index] += 0.5

    return write


def memmove(s: Setup) -> None:
    ctypes.memmove(s.weight.data_ptr() + 40_000, s.weight.data_ptr(), 4096)


def from_a_thread(s: Setup) -> None:
    thread = threading.Thread(target=lambda: s.weight[1, 3].neg_())
    thread.start()
    thread.join()


def read_from_pipe(s: Setup) -> None:
    """The kernel writes to the pages, not an instruction of this process."""
    reader, writer = os.pipe()
    os.write(writer, np.linspace(-1, 1, 512, dtype=np.float32).tobytes())
    view = memoryview(s.weight.view(-1).numpy()).cast("B")
    assert os.readv(reader, [view[8192 : 8192 + 2048]]) == 2048
    os.close(reader)
    os.close(writer)


def from_another_process(s: Setup) -> None:
    """process_vm_writev, as a debugger would."""
    code = f"""
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        data = (ctypes.c_float * 8)(*[0.25] * 8)
        local = (ctypes.c_size_t * 2)(ctypes.addressof(data), 32)
        remote = (ctypes.c_size_t * 2)({s.weight.data_ptr() + 100_000}, 32)
        done = libc.process_vm_writev({os.getpid()}, local, 1, remote, 1, 0)
        raise SystemExit(0 if done == 32 else 77)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    if done.returncode != 0:
        pytest.skip("process_vm_writev is not permitted here")


def dropped_pages(s: Setup) -> None:
    """MADV_DONTNEED: the pages are gone and read as zeros; nothing was written."""
    begin, size = whole_pages(s.weight)
    assert ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), 4) == 0


def remapped_pages(s: Setup) -> None:
    """New pages at the old addresses."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    begin, size = whole_pages(s.weight)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
    got = libc.mmap(ctypes.c_void_p(begin), ctypes.c_size_t(size), 3, flags, -1, ctypes.c_size_t(0))
    assert got == begin


WRITES: dict[str, Callable[[Setup], object]] = {
    "optimiser": optimiser_step,
    "load_state_dict": load_state,
    "data.copy_": lambda s: s.weight.copy_(s.weight.flip(1).clone()),
    "first element": numpy_element((0, 0, 0)),
    "inner element": numpy_element((1, 100, 17)),
    "last element": numpy_element((2, 255, 255)),
    "memmove": memmove,
    "thread": from_a_thread,
    "readv": read_from_pipe,
    "another process": from_another_process,
    "dropped pages": dropped_pages,
    "new pages": remapped_pages,
    "new storage": lambda s: setattr(s.critic.weights[2], "data", s.weight * 0.5),
    "bias": lambda s: s.critic.biases[1].data.add_(0.1),
    "head": lambda s: s.critic.weights[4].data.mul_(1.5),
    "norm": lambda s: s.critic.norm_weights[0].data.mul_(1.5),
}


@needs_watch
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_every_write_is_seen(write):
    s = Setup().watched()
    before = s()
    write(s)
    after = s()
    assert not torch.equal(after, before)
    assert torch.equal(after, s.fresh())
    for _ in range(2 * CALLS_UNTIL_WATCHED):  # watched again, of what is there now
        assert torch.equal(s(), after)


@needs_watch
def test_watching_returns_after_a_write_and_sees_the_next():
    s = Setup().watched()
    for _ in range(3):
        s.weight[1].neg_()
        assert torch.equal(s(), s.fresh())
        s.watched(100)


@needs_watch
def test_two_readers_of_the_same_parameters():
    """Protection is a page's, not a reader's: one that protects again must not hide a write from the other."""
    a, first = Setup(), Setup("bfloat16")
    b = Setup("bfloat16", a.critic)
    assert torch.equal(b(), first())
    a.watched()
    b.watched()
    a.weight[1].neg_()  # away from the edges, which are compared
    for _ in range(4 * CALLS_UNTIL_WATCHED):
        a()
    assert a.status() == "watching"
    assert torch.equal(b(), b.fresh())
    b.watched(4 * CALLS_UNTIL_WATCHED)
    b.weight[1].mul_(2)
    assert torch.equal(b(), b.fresh())
    assert torch.equal(a(), a.fresh())


@needs_watch
def test_writes_between_calls_are_not_paid_for_again_and_again():
    """A write to a protected page costs more than reading it: weights that change at every few calls are read."""
    s = Setup()
    watching = 0
    for i in range(200):
        s()
        watching += s.status() == "watching"
        if i % 8 == 7:
            s.weight[0, 0, 0] += 0.25
            assert torch.equal(s(), s.fresh())
    assert watching <= 8


@needs_watch
def test_small_networks_are_read():
    s = Setup(critic=CriticEnsemble(OBS, ACTION, 2, (32, 32)))
    for _ in range(2 * CALLS_UNTIL_WATCHED):
        s()
    assert s.status() == "less than 1 MB"


def _negate(critic: CriticEnsemble) -> None:
    critic.weights[2].data[1].neg_()


def test_shared_memory_is_read_at_every_call():
    """Another process writes through page tables of its own."""
    s = Setup()
    s.critic.share_memory()
    before = [s() for _ in range(2 * CALLS_UNTIL_WATCHED)][-1]
    assert "shared" in s.status() or REFUSAL
    process = multiprocessing.get_context("spawn").Process(target=_negate, args=(s.critic,))
    process.start()
    process.join()
    assert process.exitcode == 0
    after = s()
    assert not torch.equal(after, before)
    assert torch.equal(after, s.fresh())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_and_its_parent_see_their_own_writes():
    """In a process of its own: a fork of the test process would carry its threads' locks."""
    code = """
        import os, sys
        sys.path.insert(0, {tests!r})
        import torch
        torch.set_num_threads(1)
        from test_write_watch import Setup
        s = Setup()
        for _ in range(8):
            before = s()
        child = os.fork()
        if child == 0:
            ok = torch.equal(s(), before)
            s.weight[0].neg_()
            ok &= torch.equal(s(), s.fresh()) and not torch.equal(s(), before)
            for _ in range(8):
                changed = s()
            s.weight[0].neg_()
            os._exit(0 if ok and torch.equal(s(), before) and not torch.equal(changed, before) else 1)
        assert os.waitpid(child, 0)[1] == 0, "child"
        assert torch.equal(s(), before)
        s.weight[1].neg_()
        assert torch.equal(s(), s.fresh()) and not torch.equal(s(), before)
    """
    here = os.path.dirname(__file__)
    subprocess.run([sys.executable, "-c", textwrap.dedent(code).format(tests=here)], check=True, timeout=120)


def test_concurrent_calls_while_weights_change_between_rounds():
    s = Setup()
    for round_ in range(12):
        if round_ % 6 == 5:
            s.weight[round_ % 3].neg_()
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda _: s(), range(4)))
        expected = s.fresh()
        assert all(torch.equal(result, expected) for result in results)


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv(native.WATCH_VARIABLE, "0")
    s = Setup()
    for _ in range(2 * CALLS_UNTIL_WATCHED):
        s()
    assert s.status() == "not asked for"
    s.weight[0].neg_()
    assert torch.equal(s(), s.fresh())


@needs_watch
def test_explain_says_how_live_weights_are_found_unchanged():
    s = Setup()
    assert "live weights: " in str(s.sampler.explain(1))
    s.watched()
    assert "critic watching" in str(s.sampler.explain(1))
    s.sampler.freeze()
    assert "live weights" not in str(s.sampler.explain(1))
