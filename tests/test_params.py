"""The lists and structs that Python and C++ both write: equal, and what one side does not know is refused."""

from __future__ import annotations

import ast
import ctypes
from pathlib import Path

import pytest

from qpilots_fast import Steering
from qpilots_fast.backends import native, params
from qpilots_fast.backends.cpu import CpuBackend
from qpilots_fast.backends.params import SteeringParams, interface_lines, interface_mismatch, steering_params

needs_module = pytest.mark.skipif(native.import_failure() is not None, reason=str(native.import_failure()))
MLP = {
    "members": 1, "widths": [8, 4], "hidden": [{"activation": "tanh", "norm": None, "layer_norm_eps": 1e-6}],
    "scalar_head": False, "inputs": [(1, 0, 4)],
}  # fmt: skip


def text(own: dict[str, tuple[str, ...]]) -> str:
    return "\n".join(interface_lines(own)) + "\n"


def test_text_of_the_same_lists_matches():
    own = {"Stage": ("rows", "state")}
    assert interface_mismatch(text(own), own) is None


@pytest.mark.parametrize(
    "old, new",
    [
        ("gelu_tanh gelu", "gelu gelu_tanh"),  # another order
        (" mish tanh", " mish tanh elu"),  # a value more
        ("norm_match absolute", "norm_match"),
        ("rho:float32@36", "tau:float32@36"),  # another field
        ("num_samples:int32", "num_samples:float32"),
        ("Stage rows state\n", ""),
    ],
)
def test_other_lists_are_refused(old: str, new: str):
    own = {"Stage": ("rows", "state")}
    assert old in text(own)
    assert "other sources" in str(interface_mismatch(text(own).replace(old, new), own))


@needs_module
def test_the_package_uses_all_that_the_compiled_module_exports():
    module, used = native.load_module(), set()
    for file in Path(native.__file__).parents[1].rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.Constant):  # getattr(module, name)
                used.add(node.value)
    exported = {name: getattr(module, name) for name in dir(module) if not name.startswith("_")}
    members = {
        member
        for value in exported.values()
        if isinstance(value, type)
        for member in vars(value)
        if not member.startswith("_")
    }
    functions = {name for name, value in exported.items() if not isinstance(value, type)}
    assert "cpu_sample" in functions and "arena_bytes" in members
    assert (functions | members) - used == set()


@needs_module
def test_compiled_module_of_other_sources_does_not_load(monkeypatch: pytest.MonkeyPatch):
    native.load_module.cache_clear()
    monkeypatch.setitem(params.ENUMS, "Activation", (*params.ENUMS["Activation"], "another"))
    try:
        with pytest.raises(ImportError, match="another"):
            native.load_module()
        assert "another" in str(CpuBackend().unavailable_reason())
    finally:
        native.load_module.cache_clear()


@needs_module
@pytest.mark.parametrize(
    "changed",
    [{"activation": "another"}, {"norm": "another"}, {"chain": [("another", "", [])]}, {"chain": [("add", "", [])]}],
    ids=["activation", "norm placement", "operation", "nothing kept"],
)
def test_network_with_an_unknown_value_is_refused(changed: dict):
    module = native.load_module()
    assert module.cpu_network(MLP, "float32", "") is not None
    with pytest.raises(ValueError, match=r"another|without a row kept"):
        module.cpu_network({**MLP, "hidden": [{**MLP["hidden"][0], **changed}]}, "float32", "")


@needs_module
@pytest.mark.parametrize("field", ["estimate", "clip", "aggregation", "scale", "q_scale_kind"])
def test_steering_with_an_unknown_value_is_refused(field: str):
    module = native.load_module()
    steering = steering_params(Steering.unsteered())
    plan = {"flow": module.cpu_network(MLP, "float32", ""), "critic": None, "posterior": None}
    for bytes_of in (lambda: bytes(steering), lambda: bytes(steering)[:-4]):
        setattr(steering, field, 99)
        with pytest.raises(ValueError, match="steering"):
            module.cpu_plan({**plan, "steering": bytes_of()})


def test_steering_params_hold_every_number_of_a_steering():
    steering = Steering(
        alpha=0.3,
        rho=0.25,
        tau=2.0,
        eps=0.5,
        max_grad_norm=4.0,
        gaf_beta=5.0,
        gaf_decay=6.0,
        gaf_min=7.0,
        max_disagreement=8.0,
    )
    made = steering_params(steering)
    for name, kind in params.FIELDS:
        if kind is ctypes.c_float and hasattr(steering, name) and name != "q_scale":
            assert getattr(made, name) == pytest.approx(getattr(steering, name))
    assert steering_params(Steering()).max_disagreement == float("inf")
    assert made.q_scale == 1.0
    assert ctypes.sizeof(SteeringParams) == 4 * len(params.FIELDS)
