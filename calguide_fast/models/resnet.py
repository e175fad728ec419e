"""ResNet classifiers (He et al., 2016, arXiv 1512.03385) with torchvision's state-dict keys, for guidance at x̂₀."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def _activation(softplus_beta: float | None) -> nn.Module:
    # in place is safe: an activation only ever follows a batch norm or a sum, and neither keeps its output
    return nn.ReLU(inplace=True) if softplus_beta is None else nn.Softplus(beta=softplus_beta)


def _downsample(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a residual connection."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, softplus_beta: float | None):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = _activation(softplus_beta)
        self.downsample = _downsample(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return self.relu(h + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions with a residual connection; the 3×3 one carries the stride."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, softplus_beta: float | None):
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = _activation(softplus_beta)
        self.downsample = _downsample(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        return self.relu(h + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A residual classifier: `classifier(x0)` -> logits.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: blocks in each of the four stages.
        num_classes: number of classes.
        in_channels: channels of the input images.
        softplus_beta: None for ReLU; a positive number swaps every ReLU for Softplus(β), whose smooth gradient guides
            better (Ma et al., ICLR 2024). The weights are the same.

    Raises:
        ValueError: for a `softplus_beta` that is not positive.
    """

    class_conditional = False

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        softplus_beta: float | None = None,
    ):
        if softplus_beta is not None and not softplus_beta > 0:
            raise ValueError(f"softplus_beta must be None or a positive number, got {softplus_beta}")
        super().__init__()
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = _activation(softplus_beta)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        channels = 64
        for stage, depth in enumerate(depths):
            width = 64 * 2**stage
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(block(channels, width, stride, softplus_beta))
                channels = width * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))

        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) -> logits (B, num_classes).

        Raises:
            ValueError: for an input of another shape.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must have shape (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        h = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        h = self.layer4(self.layer3(self.layer2(self.layer1(h))))
        return self.fc(self.avgpool(h).flatten(1))


def resnet18(num_classes: int = 1000, in_channels: int = 3, softplus_beta: float | None = None) -> ResNet:
    """ResNet-18; the arguments and errors are those of `ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, in_channels, softplus_beta)


def resnet34(num_classes: int = 1000, in_channels: int = 3, softplus_beta: float | None = None) -> ResNet:
    """ResNet-34; the arguments and errors are those of `ResNet`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, in_channels, softplus_beta)


def resnet50(num_classes: int = 1000, in_channels: int = 3, softplus_beta: float | None = None) -> ResNet:
    """ResNet-50; the arguments and errors are those of `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, in_channels, softplus_beta)


def resnet101(num_classes: int = 1000, in_channels: int = 3, softplus_beta: float | None = None) -> ResNet:
    """ResNet-101, the paper's classifier; the arguments and errors are those of `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, in_channels, softplus_beta)


def resnet152(num_classes: int = 1000, in_channels: int = 3, softplus_beta: float | None = None) -> ResNet:
    """ResNet-152; the arguments and errors are those of `ResNet`."""
    return ResNet(Bottleneck, (3, 8, 36, 3), num_classes, in_channels, softplus_beta)
