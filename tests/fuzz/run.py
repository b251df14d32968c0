"""One fuzz run: samplers are drawn, and each called a few times, until so many calls were made."""

from __future__ import annotations

import logging
import warnings

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.calls import calls
from tests.fuzz.judge import Judge, Tally
from tests.fuzz.samplers import subjects

CALLS_PER_SAMPLER = 12
BACKENDS = ("cpu", "cpu", "cpu", "auto", "reference")
SAMPLERS_PER_ROUND = 200  # hypothesis keeps what it drew until a round ends


def run(number: int, first_seed: int, tally: Tally | None = None) -> Tally:
    """Makes this many calls.

    Args:
        tally: counts them, also where the run stops early.

    Raises:
        Finding: the smallest example found of an answer that is neither right nor tolerated.
    """
    tally = Tally() if tally is None else tally

    def one(data: st.DataObject) -> None:
        subject = data.draw(subjects())
        judge = Judge(subject, data.draw(st.sampled_from(BACKENDS)), tally)
        if judge.made():
            for call in data.draw(st.lists(calls(subject, judge.sampler), min_size=4, max_size=CALLS_PER_SAMPLER)):
                judge(call)

    quiet = settings(
        max_examples=SAMPLERS_PER_ROUND, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink), print_blob=False, report_multiple_bugs=False,
    )  # fmt: skip
    logger = logging.getLogger("qpilots_fast")
    threads, level = torch.get_num_threads(), logger.level
    torch.set_num_threads(1)  # small matrices: more threads only wait for each other
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            while tally.calls < number:
                seed(first_seed + tally.calls)(quiet(given(st.data())(one)))()
    finally:
        torch.set_num_threads(threads)
        logger.setLevel(level)  # later tests of this process read the log
    return tally
