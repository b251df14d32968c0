"""Fused sampling for flow policies steered by a critic (QPILOTS-U, QPILOTS-M and their rivals)."""

from . import heads, networks, objectives, ops
from .callables import as_critic, as_flow, as_posterior
from .errors import BackendUnavailable
from .from_module import explain_module, from_module
from .gate import calibrate_gate
from .networks import CriticEnsemble, FlowMLP, MetaFlowMap
from .sampler import SampleInfo, SteeredSampler
from .steering import Steering

__version__ = "0.2.0"

__all__ = [
    "BackendUnavailable",
    "CriticEnsemble",
    "FlowMLP",
    "MetaFlowMap",
    "SampleInfo",
    "SteeredSampler",
    "Steering",
    "as_critic",
    "as_flow",
    "as_posterior",
    "calibrate_gate",
    "explain_module",
    "from_module",
    "heads",
    "networks",
    "objectives",
    "ops",
]
