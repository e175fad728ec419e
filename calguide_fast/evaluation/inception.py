"""Inception's features under the conventions that figures are published with."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from calguide_fast.evaluation.extractors import ImageFeatures

PROTOCOLS = ("adm", "pytorch-fid")
PUBLISHED_AT = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
# of its SHA-256, as its name says
PUBLISHED_HASH = "6726825d"
SIZE = 299
# `mixed_6/conv` of TensorFlow's graph; of its channels ADM's evaluator takes the first seven
SPATIAL_LAYER, SPATIAL_CHANNELS = "Mixed_6d.branch1x1", 7


class Inception:
    """The Inception-v3 of FID, as torch-fidelity has it, with TensorFlow's weights of 2015-12-05.

    Called with (B, 1 or 3, H, W) uint8 images, it gives pool3 (B, 2048); the first 7 channels of ``mixed_6/conv``,
    (B, 17·17·7) in TensorFlow's order NHWC, as ``mu_s`` of OpenAI's files has them; and the logits (B, 1008) without
    their bias, as the evaluators of Salimans et al. and of ADM take them. A single channel is repeated.

    Args:
        path: the weights, torch-fidelity's file or pytorch-fid's, which hold the same.
        protocol: "adm" for TensorFlow 1's bilinear resizing and (x − 128)/128, as in guided-diffusion's evaluator,
            TTUR's and torch-fidelity; "pytorch-fid" for PyTorch's bilinear resizing and 2·(x/255) − 1.
        device: where it runs.

    Attributes:
        name: of the network and the library.
        sha256: of the file.

    Raises:
        FileNotFoundError: there is no such file; the message says where it is published.
        ImportError: torch-fidelity is not installed.
        ValueError: the file is damaged, needs code to be run or holds other weights; another protocol.
    """

    def __init__(self, path: str | Path, protocol: str = "adm", device: torch.device | str = "cpu"):
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol={protocol!r} must be one of {', '.join(map(repr, PROTOCOLS))}")
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no Inception weights at {path}; they are published at {PUBLISHED_AT}")
        content = path.read_bytes()
        self.protocol = protocol
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._net = _network(content, path).to(device)
        import torch_fidelity

        self.name = f"Inception-v3 of torch-fidelity {torch_fidelity.__version__}"
        self._blocks = [block for name, block in self._net.named_children() if name != "fc"]

    def __call__(self, images: Tensor) -> ImageFeatures:
        x = self._resized(images.expand(-1, 3, -1, -1).float())
        seen: list[Tensor] = []
        layer = self._net.get_submodule(SPATIAL_LAYER)
        handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            with _full_precision():
                for block in self._blocks:
                    x = block(x)
        finally:
            handle.remove()
        pool3 = x.flatten(1)
        spatial = seen[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return ImageFeatures(pool3, spatial, pool3 @ self._net.get_parameter("fc.weight").T)

    def _resized(self, x: Tensor) -> Tensor:
        if self.protocol == "pytorch-fid":
            return 2 * F.interpolate(x / 255, size=(SIZE, SIZE), mode="bilinear", align_corners=False) - 1
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        return (interpolate_bilinear_2d_like_tensorflow1x(x, (SIZE, SIZE), align_corners=False) - 128) / 128


def _network(content: bytes, path: Path) -> torch.nn.Module:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError(
            f"Inception's features need torch-fidelity ({error}): pip install '.[evaluate]' in the source folder "
            "(or 'calguide_fast[evaluate]')"
        ) from error
    # torch-fidelity would run code that a file brings along; what this load accepts brings none
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} was refused: it is damaged, or reading it would run code: {error}") from None
    try:
        return FeatureExtractorInceptionV3(
            "inception-v3", ["2048"], feature_extractor_weights_path=io.BytesIO(content)
        ).eval()
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds other weights than Inception's, published at {PUBLISHED_AT}: {error}") from None


@contextmanager
def _full_precision() -> Iterator[None]:
    """Convolutions in float32: a GPU would round their inputs to 10 bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
