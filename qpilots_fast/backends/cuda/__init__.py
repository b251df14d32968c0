"""One persistent CUDA kernel a call, for small batches. Importing this package does not need the built library."""

from __future__ import annotations

from .backend import MAX_BATCH_SIZE, CudaBackend, PackedWeights
from .library import Library

__all__ = ["MAX_BATCH_SIZE", "CudaBackend", "Library", "PackedWeights"]
