"""Other people's conventions, brought to this package's: diffusion, guidance, flows whose time runs backwards."""

from .diffusion import DiffusionVelocity, GaussianPath, ddim_steered_sample
from .guidance import ClassifierFreeGuidance
from .reversed_time import ReversedTimeFlow, real_dims

__all__ = [
    "ClassifierFreeGuidance",
    "DiffusionVelocity",
    "GaussianPath",
    "ReversedTimeFlow",
    "ddim_steered_sample",
    "real_dims",
]
