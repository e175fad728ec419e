"""Other libraries' models as FDivSampler takes them: diffusers, EDM, k-diffusion; and ours as k-diffusion does."""

from .denoiser import DenoiserModel
from .diffusers import DiffusersModel, from_diffusers
from .edm import EDMModel, from_edm
from .k_diffusion import EpsDenoiser, KDiffusionModel, as_denoiser, from_k_diffusion

__all__ = [
    "DenoiserModel",
    "DiffusersModel",
    "EDMModel",
    "EpsDenoiser",
    "KDiffusionModel",
    "as_denoiser",
    "from_diffusers",
    "from_edm",
    "from_k_diffusion",
]
