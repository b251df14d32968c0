"""How the kernel of chains.py takes a chain of row operations: names, planes that it saves, and its block."""

from __future__ import annotations

from ...activations import ACTIVATIONS
from ...row_ops import Chain, RowOp
from ...spec import NetworkSpec

MAX_OPS = 6  # of a chain: each is a parameter of the kernel
MAX_WIDTH = 4096  # of a row, which one program holds
UNSAVED = ("keep", "add")  # their pull-back needs nothing of the forward
_ELEMENTS = 2048  # of a program: 16 a thread, with what an operation keeps beside them far from any spill


def is_activation(chain: Chain) -> bool:
    """Whether a chain is one activation, which a product's epilogue applies."""
    return len(chain) == 1 and chain[0].name in ACTIVATIONS


def is_saved(op: RowOp) -> bool:
    """Whether the pull-back of an operation reads a plane that it saved."""
    return op.name not in UNSAVED


def kept_ops(chain: Chain) -> list[str]:
    """Those that touch the kept row, in order."""
    return [op.name for op in chain if not is_saved(op)]


def chain_refusal(network: NetworkSpec) -> str | None:
    """Why the kernel cannot run the chains of a network, or None where it can."""
    for layer, (width, chain) in enumerate(zip(network.hidden_dims, network.chains)):
        what = f"hidden layer {layer} of the {network.kind} has"
        if len(chain) > MAX_OPS:
            return f"{what} {len(chain)} row operations; it runs at most {MAX_OPS}"
        if width > MAX_WIDTH and not is_activation(chain):
            return f"{what} {width} columns; it runs row operations on at most {MAX_WIDTH}"
        if sum(op.name == "film" for op in chain) > 1:
            return f"{what} several modulations by the time; it runs one"
    if network.kind == "critic" and network.film_dim:
        return "the critic has modulations by the time, which it runs in flows and maps"
    return None


def chain_block(columns: int) -> dict[str, int]:
    """Block sizes and compile options for rows of so many padded columns."""
    width = max(16, 1 << (columns - 1).bit_length())
    return {
        "BLOCK_B": max(1, _ELEMENTS // width),
        "BLOCK_W": width,
        "num_warps": max(4, width // 512),
        "num_stages": 1,
    }
