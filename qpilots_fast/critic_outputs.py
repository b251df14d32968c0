"""The one reader of what critics return: [E, B], however a user's own critic spells it."""

from __future__ import annotations

import re
from collections.abc import Callable, MutableMapping, MutableSet, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from .callables import is_list
from .steering import check_choice
from .trees import with_rows
from .user_warning import warn

CRITIC_LAYOUTS = ("auto", "members_first", "batch_first")

# How an output is to be read: "members_first" [E, B] or [E, B, 1]; "batch_first" [B, E] or [B, E, 1] (so [B, 1]);
# "single" [B]; a tuple of one of these for each entry of a list. "either" [B, B] could be both of the first two.
Layout = str | tuple[Any, ...]

# Numbers a row that are taken as members; shapes cannot tell members from the atoms of a distribution. As a rule
# ensembles have 2 to 20 members, and distributions 51 or 101 atoms.
MOST_HEADS = 20

# what a probe found, by critic; a layout is a property of the function
_settled: MutableMapping[Any, Layout] = WeakKeyDictionary()
_said: MutableSet[Any] = WeakSet()  # critics whose columns were spoken of


def describe(output: Any) -> str:
    """An output's structure, for messages."""
    if isinstance(output, Tensor):
        return str(list(output.shape))
    if isinstance(output, (list, tuple)):
        return f"{type(output).__name__} of " + (", ".join(describe(value) for value in output) or "nothing")
    return type(output).__name__


def layout_of(output: Any, batch_size: int, wanted: str = "auto", owner: str = "critic") -> Layout:
    """How to read a critic's output for batch_size rows, by its shape alone.

    Args:
        wanted: one of CRITIC_LAYOUTS; settles [B, B].
        owner: who returned it, for messages.

    Raises:
        TypeError: for what is no tensor, nor a list or tuple of them.
        ValueError: for shapes that are none of those expected, and members that differ in shape or dtype.
    """
    if isinstance(output, (list, tuple)):
        layouts = tuple(layout_of(entry, batch_size, wanted, owner) for entry in output)
        kinds = {(describe(entry), getattr(entry, "dtype", None)) for entry in output}
        if len(kinds) != 1:
            got = ", ".join(f"{describe(entry)} {getattr(entry, 'dtype', '')}".rstrip() for entry in output)
            raise ValueError(
                f"{owner} returned a {type(output).__name__} of {got or 'nothing'}; expected at least one member, all "
                "of one shape and dtype."
            )
        return layouts
    if not isinstance(output, Tensor):
        keys = keys_of(output, lambda entry: is_value(entry, batch_size))
        values = taken_out("critic(obs, actions)", keys) if keys else "critic(obs, actions)[...]"
        raise TypeError(
            f"{owner} returned {type(output).__name__}; expected a Tensor [E, B] (or [B, E], [B, 1], [B], a list of "
            f"these) from {owner}(obs, actions). Where the values are inside, take them out: "
            f"qpilots_fast.as_critic(critic, call=lambda critic, obs, actions: {values})."
        )
    shape = tuple(output.shape)
    if shape == (batch_size,):
        return "single"
    if len(shape) == 3 and shape[2] == 1:
        shape = shape[:2]
    if len(shape) == 2:
        if shape == (batch_size, batch_size) and batch_size > 1:
            return "either" if wanted == "auto" else wanted
        if shape[1] == batch_size and (wanted != "batch_first" or batch_size == 1 == shape[0]):
            return "members_first"
        if shape[0] == batch_size and wanted != "members_first":
            return "batch_first"
    b = batch_size
    expected = {
        "auto": f"[E, {b}], [{b}, E], [{b}, 1], [{b}], [E, {b}, 1]",
        "members_first": f"[E, {b}], [{b}], [E, {b}, 1]",
        "batch_first": f"[{b}, E], [{b}, 1], [{b}]",
    }[wanted]
    because = "" if wanted == "auto" else f" with critic_layout={wanted!r}"
    raise ValueError(
        f"{owner} returned shape {list(output.shape)} for {b} rows{because}; expected {expected}, or a list or tuple "
        f"of these, from {owner}(obs, actions)."
    )


def keys_of(output: Any, is_wanted: Callable[[Any], bool]) -> list[Any]:
    """Where a dict or a row holds what is wanted: the first, and its like of a dict's, as "q2" is "q1"'s."""
    if not isinstance(output, dict):
        entries = output if isinstance(output, (list, tuple)) else ()
        return [index for index, entry in enumerate(entries) if is_wanted(entry)][:1]
    found = [key for key, entry in output.items() if is_wanted(entry)]
    return [key for key in found if _like(output, key) == _like(output, found[0])]


def taken_out(call: str, keys: Sequence[Any]) -> str:
    """Python for what `keys_of` found in what a call returns."""
    return f"{call}[{keys[0]!r}]" if len(keys) == 1 else f"list(map({call}.get, {tuple(keys)!r}))"


def is_value(output: Any, batch_size: int) -> bool:
    """Whether `layout_of` reads it."""
    try:
        layout_of(output, batch_size)
    except (TypeError, ValueError):
        return False
    return True


def _like(output: dict[Any, Any], key: Any) -> tuple[str, str]:
    return re.sub(r"\d+", "#", str(key)), describe(output[key])


def read_output(output: Any, layout: Layout) -> Tensor:
    """The output as q_values [E, B]."""
    if isinstance(layout, tuple):
        return torch.cat([read_output(entry, part) for entry, part in zip(output, layout)])
    if layout == "single":
        return output.unsqueeze(0)
    if output.ndim == 3:
        output = output.squeeze(-1)
    return output if layout == "members_first" else output.transpose(0, 1)


def ask_critic(
    critic: Callable[..., Any], obs: Any, actions: Tensor, layout: str = "auto", owner: str = "critic",
    t: float | None = None, known_as: Any = None,
) -> Tensor:  # fmt: skip
    """q_values [E, B] = critic(obs, actions), or critic(obs, actions, t [B, 1]) where t is given, in any layout.

    An output [B, B] is [E, B] or [B, E]: with layout="auto" the critic is asked once more, at another batch size, and
    what this shows is remembered for that critic, or for known_as, which it wraps.

    Raises:
        TypeError, ValueError: for outputs that cannot be read, and where such a question cannot be asked.
    """
    key = critic if known_as is None else known_as
    if t is not None:
        critic = _AtTime(critic, t)
    output = critic(obs, actions)
    if type(output) is Tensor and output.ndim == 2:  # what most critics return, without a further look
        rows, columns = output.shape
        if columns == actions.shape[0] and rows != columns and layout != "batch_first":
            return output
    found = layout_of(output, len(actions), layout, owner)
    if _is_open(found):
        found = _remembered(key, found) or _settle(key, _probe(critic, obs, actions, found, owner))
    if layout == "auto":
        _check_columns(key, output, found, owner)
    return read_output(output, found)


def _columns(output: Any, layout: Layout) -> list[int]:
    """The numbers a row of each tensor [B, n]; 1 where the form says by itself which are members."""
    if isinstance(layout, tuple):
        return [count for entry, part in zip(output, layout) for count in _columns(entry, part)]
    return [output.shape[1] if layout == "batch_first" and output.ndim == 2 else 1]


def _check_columns(critic: Any, output: Any, layout: Layout, owner: str) -> None:
    """Says once of a critic that its columns are taken as members, where they could be something else.

    Raises:
        ValueError: for a list of critics of which one returns more than MOST_HEADS.
    """
    counts, several = _columns(output, layout), is_list(critic)
    most = max(counts)
    if most <= (1 if several else MOST_HEADS):
        return
    if most <= MOST_HEADS:
        _once(critic, lambda: warn_of_columns(owner, len(critic), sum(counts)))
        return
    says = f"{owner} returned {describe(output)}: {most} numbers a row"
    cure = (
        "Where they are logits, let a head read them: "
        + _with_head(several)
        + f" with head = qpilots_fast.heads.C51(v_min, v_max, {most}). Where they are members, critic_layout="
        "'batch_first' says so"
    )
    if several:
        raise ValueError(
            f"{says} may be the atoms of a distribution; expected at most {MOST_HEADS} of each critic of a list. "
            f"{cure}."
        )
    _once(
        critic,
        lambda: warn(
            f"qpilots_fast: {says} may be the atoms of a distribution, and each is taken as a member. {cure}."
        ),
    )


def _with_head(several: bool) -> str:
    called = "[head.values(q(obs, actions)) for q in critic]" if several else "head.values(critic(obs, actions))"
    return f"qpilots_fast.as_critic(critic, call=lambda critic, obs, actions: {called})"


def warn_of_columns(owner: str, critics: int, members: int) -> None:
    """Says that a list of critics returns more values than it has critics."""
    warn(
        f"qpilots_fast: {owner} is a list of {critics} modules that return {members} values a row together, which are "
        f"taken as an ensemble of E = {members} members. Where they are quantiles or logits of one value, give what "
        f"makes it: {_with_head(several=True)}, or their mean in place of head.values.",
    )


def _once(critic: Any, say: Callable[[], None]) -> None:
    """Of critics that can be remembered."""
    try:
        if critic in _said:
            return
        _said.add(critic)
    except TypeError:
        pass
    say()


class _AtTime:
    """A critic of noised actions, at flow time t."""

    def __init__(self, critic: Callable[..., Any], t: float) -> None:
        self.critic, self.t = critic, t

    def __call__(self, obs: Any, actions: Tensor) -> Any:
        return self.critic(obs, actions, actions.new_full((len(actions), 1), self.t))


def _is_open(layout: Layout) -> bool:
    return layout == "either" or (isinstance(layout, tuple) and any(map(_is_open, layout)))


def _agrees(shape: Layout, found: Layout) -> bool:
    """Whether what was found settles what the shape left open, and says the same elsewhere."""
    if isinstance(shape, tuple) and isinstance(found, tuple) and len(shape) == len(found):
        return all(map(_agrees, shape, found))
    return found in ("members_first", "batch_first") if shape == "either" else shape == found


def _remembered(critic: Any, shape: Layout) -> Layout | None:
    try:
        found = _settled.get(critic)
    except TypeError:  # neither hashable nor weakly referable: asked anew at every call
        return None
    return found if found is not None and _agrees(shape, found) else None


def _probe(critic: Any, obs: Any, actions: Tensor, shape: Layout, owner: str) -> Layout:
    """The layout of an output [B, B], from the critic's output for another number of rows."""
    size = len(actions)
    other = size - 1 if size > 2 else size + 1  # never 1: one row would broadcast against what could not be cut
    devices = [actions.device] if actions.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):  # a critic with dropout draws no more than without
            output = critic(with_rows(obs, size, other), with_rows(actions, size, other))
        found, reason = layout_of(output, other, "auto", owner), None
        if not _agrees(shape, found):
            reason = f"there it returned {describe(output)}"
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no message'}"
    if reason is not None:
        raise ValueError(
            f"{owner} returned [{size}, {size}] for {size} rows: [members, rows] or [rows, members]? Asking it for "
            f"{other} rows instead did not tell ({reason}). Say it: critic_layout='members_first' where it returns "
            "[E, B], critic_layout='batch_first' where it returns [B, E]."
        )
    return found


def _settle(critic: Any, found: Layout) -> Layout:
    """found, from now on `_remembered` for that critic."""
    try:
        _settled[critic] = found
    except TypeError:
        pass
    return found


def check_layout(value: object) -> None:
    """Raises unless value is one of CRITIC_LAYOUTS."""
    check_choice("critic_layout", value, CRITIC_LAYOUTS)
