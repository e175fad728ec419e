"""Networks in plain PyTorch (ADM UNets and classifiers, ResNets), their weights, and adapters for other libraries'."""

from .adapters import as_denoiser, from_diffusers, from_edm, from_k_diffusion
from .checkpoint import load_checkpoint
from .presets import PRESETS, Preset, adm_classifier, adm_unet
from .resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152
from .specs import LoadedClassifier, load_classifier, load_unet
from .unet import EncoderUNet, UNet

__all__ = [
    "PRESETS",
    "EncoderUNet",
    "LoadedClassifier",
    "Preset",
    "ResNet",
    "UNet",
    "adm_classifier",
    "adm_unet",
    "as_denoiser",
    "from_diffusers",
    "from_edm",
    "from_k_diffusion",
    "load_checkpoint",
    "load_classifier",
    "load_unet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]
