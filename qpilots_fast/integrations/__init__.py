"""Other people's conventions, brought to this package's: diffusion policies, and flows whose time runs backwards."""

from .diffusion import DiffusionVelocity, GaussianPath, ddim_steered_sample
from .reversed_time import ReversedTimeFlow, real_dims

__all__ = ["DiffusionVelocity", "GaussianPath", "ReversedTimeFlow", "ddim_steered_sample", "real_dims"]
