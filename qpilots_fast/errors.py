"""Exceptions raised by qpilots_fast."""

from __future__ import annotations


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why and what to do."""
