"""Conditions that several test files share."""

from __future__ import annotations

import pytest

from qpilots_fast import backends

_CPU_REASON = backends.unavailable_reason("cpu")
needs_cpu = pytest.mark.skipif(_CPU_REASON is not None, reason=str(_CPU_REASON))
