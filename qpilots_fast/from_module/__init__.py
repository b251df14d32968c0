"""from_module: the user's own nn.Module as a network that the backends can run."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..callables import is_list, name_of, unwrapped
from ..joined_critics import JoinedCritics, are_alike
from ..networks import PackableNetwork
from ..spec import KINDS, NetworkSpec
from . import layers, stacked
from .calling import SCALES, OutputLayout, UserCall, check_argument_order, read_layout
from .dependence import check_other_tensors, check_repeats, followed_modes
from .explain import ModuleExplanation, explain_own, explain_packed
from .hints import calls_to_try, check_hints, dims_to_try
from .modules import ModuleNetwork, Recognition, dropouts
from .proof import batch_size_apart_from, prove, prove_far, random_blocks
from .python_state import facts_read
from .random_states import kept_random_states
from .refusal import NotCallable, Refused, first_line
from .sources import is_mapping, named_sources, randomise, submodule, unwrap_inside
from .structure import from_operations
from .template import StackedTemplate, stacked_template
from .trunk import from_layers
from .way_out import way_out
from .whole_rows import in_dtype

__all__ = ["ModuleNetwork", "Recognition", "cure_for", "explain_module", "from_module", "recognise"]


def from_module(module: nn.Module | Sequence[nn.Module], kind: str = "flow", **hints: Any) -> PackableNetwork:
    """Recognises a network, or an ensemble of equal ones, in the user's module; the result shares its parameters.

    An MLP's structure is read from the module's own numbers; that of other networks (residual blocks, heads, norms,
    modulation by t) from the operations that a call is made of. Then it is proved: on float64 copies with random
    parameters, outputs and input gradients must agree on several batches. The result's forward calls the user's
    module, so training goes on as before; optimiser steps, load_state_dict, `.data` writes and `.to()` are seen by the
    next sampling call. The original module is not changed.

    Args:
        module: called as module(obs, noisy_actions, t) ("flow"), module(obs, actions) ("critic"), or
            module(obs, xbar, noisy_actions, t, s, u) ("meta_flow_map"), t being [B, 1] or [B]; or as
            module(columns) with one tensor, the blocks concatenated in `input_order`. A list, tuple or ModuleList of
            critics is an ensemble, and so is (template, params): one module, and the stacked parameters of the members,
            as TensorDictParams or as torch.func.stack_module_state's dict. Critics may return [E, B], [B, E],
            [E, B, 1], [B, 1], [B], or a list of these last.
        kind: "flow", "critic" or "meta_flow_map".
        hints: what the numbers cannot tell, or what shortens the search:

            - obs_dim, action_dim: the widths (read from attributes of that name, or inferred for flows, where absent).
            - call: (module, *blocks) -> output, for another argument order or output; blocks as above, times [B, 1].
            - output: the part of what it returns that is the output: a key, an attribute's name, or a function of it.
            - input_order: of the blocks "obs", "actions" | "noisy_actions", "xbar", "t", "s", "u" among the columns.
            - time_embedding, time_embedding_dim: "raw", "sinusoidal" or "fourier", and its width.
            - like, observation_space, action_space: a packed network, or gymnasium's Boxes, that tell the widths.
            - chunk_shape: (C, D) where the module takes actions as [B, C, D]; the result takes [B, A], A = C D.
            - obs: a function of the call's obs; the module is shown what it returns. Asked once a call.
            - dims, action_scale, action_shift: the critic is shown actions[:, dims] * scale + shift, of the flow's
              actions; tensors are read at each call.
            - activation, layer_norm, layer_norm_eps: for modules that hold plain tensors.
            - weights, biases, norm_weights, norm_biases: for these, per layer, dotted names or the tensors themselves.

    Returns:
        A PackableNetwork; pass it to SteeredSampler.

    Raises:
        ValueError: where the module is none of these, with the reason, the numbers, and how SteeredSampler takes it all
            the same: as a callable, which stays PyTorch.
        TypeError: for arguments of the wrong type.
    """
    module = prepared(module, kind)
    if isinstance(module, PackableNetwork):
        return module
    check_hints(kind, hints)
    try:
        return recognise(module, kind, hints)[0].network(module)
    except Refused as refusal:
        cure = cure_for(refusal, module, kind, hints)
        raise ValueError(f"from_module: {name_of(module)} cannot run as a packed {kind}: {refusal}. {cure}") from None


def explain_module(module: nn.Module | Sequence[nn.Module], kind: str = "flow", **hints: Any) -> ModuleExplanation:
    """What `from_module` makes of a module, layer by layer, or where it stopped; prints it, and returns it.

    It also says what the module costs as a callable, measured here on a copy, and the line that runs it so.

    Args:
        module: as `from_module`'s.
        kind: as `from_module`'s.
        hints: as `from_module`'s.

    Raises:
        ValueError, TypeError: for hints or kinds that are none; a module that does not pack raises nothing.
    """
    module = prepared(module, kind)
    if isinstance(module, PackableNetwork):
        explanation = explain_packed(module)
    else:
        check_hints(kind, hints)
        found = refusal = None
        dims: list[tuple[int, int]] = []
        try:
            found = recognise(module, kind, hints)[0]
            dims = [(found.spec.obs_dim, found.spec.action_dim)]
        except Refused as stopped:
            refusal = stopped
            try:
                dims = dims_to_try(module, kind, hints)
            except Refused:
                pass
        explanation = explain_own(module, kind, hints, dims, found, refusal)
    print(explanation)
    return explanation


def prepared(module: Any, kind: str) -> nn.Module:
    """A module, or a packed network, out of what from_module takes.

    Raises:
        TypeError, ValueError: for anything else.
    """
    if kind not in KINDS:
        raise ValueError(f"from_module: kind is {kind!r}; expected one of {', '.join(map(repr, KINDS))}.")
    module = unwrapped(module)  # a compiled module would compile anew for the proof
    if isinstance(module, PackableNetwork):
        if module.spec.kind != kind:
            raise ValueError(f"from_module: kind is {kind!r}, but the module is a packed {module.spec.kind}.")
        return module
    template = stacked_template(module)
    if template is not None:
        module = template
    elif is_list(module) or isinstance(module, (list, tuple)):
        module = [unwrapped(member) for member in module]
        if kind == "critic" and are_alike(module):
            return JoinedCritics(module)
        if module and all(isinstance(member, nn.Module) for member in module):
            module = nn.ModuleList(module)
    if not isinstance(module, nn.Module):
        raise TypeError(f"from_module: module is {type(module).__name__}; expected an nn.Module or a list of them.")
    return module


def recognise(
    module: nn.Module, kind: str, hints: dict[str, Any], in_eval_mode: bool = False
) -> tuple[Recognition, nn.Module]:
    """What a module is, as `from_module` finds out, and the float64 copy that it was proved on.

    Args:
        module: not called; no random state is changed.
        hints: checked ones.
        in_eval_mode: recognises the module in eval mode, whatever mode it is in.

    Raises:
        Refused: with the reason.
    """
    if is_mapping(module) and hints.get("call") is None:
        raise Refused(
            f"it holds parameters ({type(module).__name__}) and no forward",
            "Give (template, params), where template is the module whose parameters these are, stacked.",
        )
    asks_twice = getattr(type(module), "asks_twice", "")
    if asks_twice:
        raise Refused(asks_twice, "SteeredSampler runs it as it is: pass the module itself.")
    _check_layers(module, in_eval_mode)
    if hints.get("call") is None and not isinstance(module, StackedTemplate):
        check_argument_order(module, kind)
    with (
        torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.device("cpu"), kept_random_states(),
    ):  # fmt: skip
        if hints.get("weights"):
            hints = {**hints, "weights": stacked.roles_from_hints(module, hints)}
        probe = _copy_for_proof(module, torch.float64, in_eval_mode)
        try:
            return _held(module, _recognise(probe, kind, hints)), probe
        except Refused as refusal:
            if not isinstance(refusal, NotCallable):
                raise

            if "dtype" not in str(refusal):
                raise
            probe = _copy_for_proof(module, torch.float32, in_eval_mode)  # it casts to float32 on the way
            try:
                return _held(module, _recognise(probe, kind, hints, torch.float32)), probe
            except NotCallable:
                raise refusal from None
        except Exception as error:  # of the user's code, asked in a way that it was not made for
            raise Refused(
                f"its forward raised {type(error).__name__} while it was read: {first_line(error)}"
            ) from error


def _check_layers(module: nn.Module, in_eval_mode: bool) -> None:
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise Refused("it is scripted (torch.jit), so its parts cannot be read")
    dropping = [] if in_eval_mode else dropouts(module)
    for name, layer in module.named_modules():
        if layer.training and any(layer is dropout for dropout in dropping):
            raise Refused(f"{name} is {layer} in training mode, so its output is random; call .eval() or set p=0 first")
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training and not in_eval_mode:
            raise Refused(
                f"{name} is {type(layer).__name__} in training mode, so a row's output follows its batch; call .eval() "
                "first"
            )
    if any(tensor.is_meta for tensor in module.parameters()) and not named_sources(module):
        raise Refused("its parameters are on the meta device", "Give them values first: module.to_empty(device='cpu').")
    lazy = next((name for name, tensor in module.named_parameters() if is_lazy(tensor)), None)
    if lazy is not None:
        raise Refused(f"{lazy} has no shape yet", "Call the module once on a batch, which gives it one, and try again.")


def cure_for(refusal: Refused, module: nn.Module, kind: str, hints: dict[str, Any]) -> str:
    """What to do about a refusal, in a sentence."""
    try:
        dims = dims_to_try(module, kind, hints)
    except Refused:
        dims = []
    return refusal.cure or way_out(module, kind, dims, hints)


# ---------------------------------------------------------------- recognition


def _copy_for_proof(module: nn.Module, dtype: torch.dtype, in_eval_mode: bool) -> nn.Module:
    """A copy on the CPU in this dtype that shares nothing."""
    try:
        probe = copy.deepcopy(module).to("cpu") if not _has_meta(module) else copy.deepcopy(module)
    except Exception as error:
        raise Refused(f"it cannot be copied for the proof ({type(error).__name__}: {error})") from None
    if not is_mapping(probe):
        unwrap_inside(probe)
    probe = probe.to(dtype)
    for source, tensor in named_sources(probe):
        if tensor.dtype != dtype and source.keys:  # a mapping held as a plain attribute: .to() passed it by
            holder = submodule(probe, source.path)
            holder = getattr(holder, source.name) if source.name else holder
            for key in source.keys[:-1]:
                holder = holder[key]
            holder[source.keys[-1]] = tensor.detach().cpu().to(dtype).requires_grad_(tensor.requires_grad)
    return probe.eval() if in_eval_mode else probe


def _held(module: nn.Module, found: Recognition) -> Recognition:
    """What was found, as of the module itself, which must hold the parameters that its copy had after a call."""
    read = [(str(source), source.find) for source in found.sources]
    if found.own is not None:
        read += [(followed.name, followed.find) for followed in found.own.followed]
    for name, find in read:
        try:
            find(module)
        except (AttributeError, KeyError, TypeError):
            raise Refused(
                f"it has no {name} before its first call, which builds it",
                "Call the module once on a batch, and try again.",
            ) from None
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return replace(found, spec=in_dtype(found.spec, dtype))


def _has_meta(module: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in module.parameters())


def _recognise(probe: nn.Module, kind: str, hints: dict[str, Any], dtype: torch.dtype | None = None) -> Recognition:
    generator = torch.Generator().manual_seed(0)
    reasons: list[str] = []
    for dims, call, named in _attempts(probe, kind, hints, generator):
        call = replace(call, dtype=dtype)
        blocks = list(named.values())
        try:
            with torch.no_grad():
                traced = layers.trace(probe, call, blocks)
        except Exception as error:
            shapes = ", ".join(f"{name} {list(block.shape)}" for name, block in named.items())
            reasons.append(f"{call} with {shapes} raised {type(error).__name__}: {first_line(error)}")
            continue
        way = from_layers if traced.traceable and traced.calls else _from_tensors
        try:
            found = way(probe, kind, dims, call, traced, hints, generator)
        except Refused as refusal:
            check_repeats(probe, call, blocks)
            found = _from_operations(refusal, probe, kind, dims, call, hints, generator)
        return _with_state(probe, found, blocks)
    asks = [] if hints.get("call") is not None else ["the hint call where it takes other arguments"]
    if len(dims_to_try(probe, kind, hints)) > 1:  # guesses
        asks.insert(0, "the hints obs_dim and action_dim where it has other widths")
    tried = "; ".join(reasons[:3]) + (f" (give {', '.join(asks)})" if asks else "")
    raise NotCallable(f"it could not be called: {tried}", hint="call" if asks else "")


def _with_state(probe: nn.Module, found: Recognition, blocks: Sequence[Tensor]) -> Recognition:
    """With the modes and the plain attributes that the output follows."""

    def output() -> Tensor:
        return found.layout.apply(found.call(probe, blocks))

    with torch.no_grad():
        facts = facts_read(probe, output)
    return replace(found, modes=followed_modes(probe, found.call, found.layout, blocks), facts=facts)


def _from_operations(
    refusal: Refused, probe: nn.Module, kind: str, dims: tuple[int, int], call: UserCall, hints: dict[str, Any],
    generator: torch.Generator,
) -> Recognition:  # fmt: skip
    """The module as any structure that packed networks have, where it is no plain MLP.

    Raises:
        Refused: as the plain way did, and where this one stopped.
    """
    if hints.get("weights"):
        raise refusal
    try:
        return from_operations(probe, kind, dims, call, hints, generator)
    except Refused as other:
        both = type(refusal)(
            f"{refusal}; read operation by operation: {other}", refusal.cure, refusal.hint or other.hint
        )
        both.where = refusal.where
        raise both from None


def _attempts(
    probe: nn.Module, kind: str, hints: dict[str, Any], generator: torch.Generator
) -> Iterator[tuple[tuple[int, int], UserCall, dict[str, Tensor]]]:
    for dims in dims_to_try(probe, kind, hints):
        if dims[0] < 0 or dims[1] < 1:
            raise Refused(
                f"obs_dim={dims[0]}, action_dim={dims[1]} do not fit its first Linear; give both hints, obs_dim and "
                "action_dim"
            )
        for call in calls_to_try(kind, hints):
            yield dims, call, random_blocks(kind, dims, batch_size_apart_from(0), generator)


def _from_tensors(
    probe: nn.Module, kind: str, dims: tuple[int, int], call: UserCall, _: layers.Trace, hints: dict[str, Any],
    generator: torch.Generator,
) -> Recognition:  # fmt: skip
    """A module that holds its weights as plain tensors."""
    if hints.get("weights"):
        given = hints["weights"]
        proposals = [given, stacked.transposed(given)]
    else:
        proposals = list(stacked.propose_roles(probe))
    reasons = ["none of its tensors look like the weights of an MLP (expected [E, in, out], [E, out, in] or [out, in])"]
    for roles in proposals:
        shapes = [source.find(probe).shape for source in roles.weights]
        if any(b[2] != a[1] for a, b in pairwise(shapes)):
            continue
        used = [source.base(submodule(probe, source.path)) for source in roles.flat]
        randomise(used, generator)
        try:
            spec, layout = _search(probe, kind, dims, call, roles, shapes, hints, generator)
            prove(probe, call, layout, spec, roles.flat, generator)
        except Refused as refusal:
            reasons.append(str(refusal))
            continue

        def prove_again(times: bool, roles=roles, spec=spec, layout=layout) -> None:
            if times or spec.time_embedding == "raw":  # else what is not trained may make the time features
                prove(probe, call, layout, spec, roles.flat, generator, scales=SCALES[:1])

        def prove_at(scale: float, roles=roles, spec=spec, layout=layout) -> None:
            prove(probe, call, layout, spec, roles.flat, generator, scales=(scale,), far=True)

        prove_far(probe, set(map(id, used)), prove_at)
        check_other_tensors(probe, set(map(id, used)), prove_again, generator)
        return Recognition(spec, tuple(roles.flat), call, layout)
    raise Refused(reasons[-1])


def _search(
    probe: nn.Module, kind: str, dims: tuple[int, int], call: UserCall, roles: stacked.Roles,
    shapes: Sequence[torch.Size], hints: dict[str, Any], generator: torch.Generator,
) -> tuple[NetworkSpec, OutputLayout]:  # fmt: skip
    members = shapes[0][0]
    size = batch_size_apart_from(members)
    named = random_blocks(kind, dims, size, generator)
    with torch.no_grad():
        output = call(probe, list(named.values()))
        layout = read_layout(kind, output, size, members)
        layouts = [layout] if kind != "meta_flow_map" else [layout, OutputLayout(is_velocity=True)]
        specs = stacked.propose_specs(kind, dims, shapes, roles, hints)
        return stacked.search(probe, specs, roles, named, layout.apply(output), layouts)
