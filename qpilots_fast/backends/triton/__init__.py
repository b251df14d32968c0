"""Fused Triton kernels for NVIDIA GPUs: the throughput backend. Importing this package does not import Triton."""

from __future__ import annotations

from .backend import TritonBackend
from .launch_table import LaunchRow, LaunchTable, Tile
from .launcher import launches

__all__ = ["LaunchRow", "LaunchTable", "Tile", "TritonBackend", "launches"]
