"""Makes Triton's interpreter fit for a test suite. Imported only where TRITON_INTERPRET=1.

Two of its functions are replaced, where this version has them: its float32 <-> bfloat16 conversion truncates where the
hardware rounds to nearest even, and it lists a module's members again for every device-function call.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch


def install() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    convert = getattr(interpreter, "_convert_float", None)
    if convert is not None:

        def rounding_convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
            if source == tl.float32 and target == tl.bfloat16:
                # a copy: broadcasts are read-only
                tensor = torch.from_numpy(np.array(data, dtype=np.float32, order="C"))
                return tensor.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
            if source == tl.bfloat16 and target == tl.float32:
                return (np.asarray(data).astype(np.uint32) << 16).reshape(data.shape)
            return convert(data, source, target, mode)

        interpreter._convert_float = rounding_convert  # type: ignore[attr-defined]

    if all(hasattr(interpreter, name) for name in ("_patch_builtin", "_patch_attr", "_LangPatchScope")):
        builtins: dict[Any, list[tuple[str, Any]]] = {}

        def patch_builtin(owner: Any, builder: Any, scope: Any) -> None:
            if owner not in builtins:
                builtins[owner] = [(n, m) for n, m in inspect.getmembers(owner) if tl.core.is_builtin(m)]
            members = builtins[owner]
            if members and tl.core.is_builtin(getattr(owner, members[0][0])):  # else an outer call has patched it
                for name, member in members:
                    interpreter._patch_attr(owner, name, member, builder, scope)

        interpreter._patch_builtin = patch_builtin  # type: ignore[attr-defined]


def product_in_fixed_order(builder: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
    """tl.dot that sums over k in one order for every row, as tensor cores do; BLAS may not, by the row's position."""
    from triton.runtime.interpreter import TensorHandle

    terms = a.data[:, :, None].astype(d.data.dtype) * b.data[None, :, :].astype(d.data.dtype)
    return TensorHandle(terms.sum(axis=1) + d.data, d.dtype.scalar)
