"""Building blocks of the ADM networks (Dhariwal & Nichol, 2021, arXiv 2105.05233).

Module names and indices follow openai/guided-diffusion, so that its checkpoints load with `strict=True`; the way
the blocks compute is ours. Feature maps are (B, C, H, W) in either memory format, and blocks keep the one they get.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_GROUPS = 32


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding of timesteps, cosines first (Vaswani et al., 2017, as ordered by guided-diffusion).

    Args:
        timesteps: (B,) integer or fractional timesteps.
        dim: width of the embedding; an odd width ends in a column of zeros.
        max_period: longest wavelength over 2π, in timesteps.

    Returns:
        (B, dim) float32.
    """
    half = dim // 2
    # fp32 throughout, in the order of operations the published weights were trained with
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angles = timesteps[:, None].float() * freqs
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def zero_init(module: nn.Module) -> nn.Module:
    """Set every parameter of `module` to zero and return it: a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class GroupNorm32(nn.GroupNorm):
    """Group normalisation computed in at least fp32, returned in the dtype of its input."""

    def __init__(self, channels: int):
        if channels % NORM_GROUPS:
            raise ValueError(f"channels must be divisible by {NORM_GROUPS} normalisation groups, got {channels}")
        super().__init__(NORM_GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        h = F.group_norm(x.to(wide), self.num_groups, self.weight.to(wide), self.bias.to(wide), self.eps)
        return h.to(x.dtype)


def doubled(x: Tensor) -> Tensor:
    """Feature maps (B, C, H, W) at twice the height and width, by nearest neighbours."""
    rows_lie_together = x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()
    if not rows_lie_together or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.interpolate(x, scale_factor=2, mode="nearest")
    # what PyTorch copies float by float there, as pairs of them: up to 16 times as fast
    b, c, h, w = x.shape
    wide = torch.view_as_real(torch.complex(x, x)).view(b, c, h, 1, 2 * w)
    return wide.expand(b, c, h, 2, 2 * w).contiguous().view(b, c, 2 * h, 2 * w)


class Upsample(nn.Module):
    """Nearest-neighbour doubling of height and width, then a 3×3 convolution if `use_conv`."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(doubled(x))


class Downsample(nn.Module):
    """Halving of height and width by a strided 3×3 convolution if `use_conv`, else by averaging 2×2 blocks."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """Residual block conditioned on an embedding, which may also double (`up`) or halve (`down`) the resolution."""

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int,
        use_scale_shift_norm: bool = False,
        up: bool = False,
        down: bool = False,
    ):
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        # an in-place SiLU follows a normalisation only: its fresh output is wanted by nothing else, backward included
        self.in_layers = nn.Sequential(
            GroupNorm32(channels),
            nn.SiLU(inplace=True),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.resample = Upsample(channels, False) if up else Downsample(channels, False) if down else nn.Identity()
        # the first place is the embedding's SiLU, which the network applies once for all its blocks
        self.emb_layers = nn.Sequential(
            nn.Identity(),
            nn.Linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels),
        )
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels),
            nn.SiLU(inplace=True),
            nn.Dropout(dropout),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if out_channels == channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C, H, W), emb (B, E) already through its SiLU -> (B, C', H', W')."""
        in_norm, in_act, in_conv = self.in_layers
        h = in_conv(self.resample(in_act(in_norm(x))))

        out_norm, *out_rest = self.out_layers
        condition = self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        if self.use_scale_shift_norm:
            scale, shift = condition.chunk(2, dim=1)
            h = torch.addcmul(shift, out_norm(h), 1 + scale)
        else:
            h = out_norm(h + condition)
        for layer in out_rest:
            h = layer(h)
        return self.skip_connection(self.resample(x)) + h


class AttentionBlock(nn.Module):
    """Self-attention over the positions of a feature map, with a residual connection.

    The two orders differ in what the 3C rows of `qkv` mean: (heads, q/k/v, head channels) in the legacy order,
    (q/k/v, heads, head channels) in the new one.
    """

    def __init__(self, channels: int, num_heads: int, num_head_channels: int, use_new_attention_order: bool):
        super().__init__()
        self.num_heads = count_heads(channels, num_heads, num_head_channels)
        self.use_new_attention_order = use_new_attention_order
        self.norm = GroupNorm32(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_init(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same shape."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, T, C]
        qkv = pointwise(self.qkv, tokens)
        if self.use_new_attention_order:
            q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, T, C/heads]
        else:
            q, k, v = qkv.unflatten(2, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v)
        h = pointwise(self.proj_out, h.transpose(1, 2).flatten(2))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class AttentionPool2d(nn.Module):
    """Pooling by attention from the mean of a feature map to its positions, as CLIP's image tower does.

    Only the mean's output is kept, so only its query is computed.
    """

    def __init__(self, spatial_size: int, channels: int, num_head_channels: int, out_channels: int):
        super().__init__()
        self.num_heads = count_heads(channels, 1, num_head_channels)
        self.positional_embedding = nn.Parameter(torch.randn(channels, spatial_size**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, out_channels)."""
        channels, positions = self.positional_embedding.shape
        if x.shape[2] * x.shape[3] + 1 != positions:
            raise ValueError(
                f"attention pooling was built for {positions - 1} positions, got a feature map of "
                f"{x.shape[2]}x{x.shape[3]}: the input must have the model's image_size"
            )
        tokens = x.flatten(2)
        tokens = torch.cat([tokens.mean(dim=2, keepdim=True), tokens], dim=2)
        tokens = (tokens + self.positional_embedding.to(x.dtype)).transpose(1, 2)  # [B, T, C]

        weight, bias = self.qkv_proj.weight[:, :, 0], self.qkv_proj.bias
        q = F.linear(tokens[:, :1], weight[:channels], bias[:channels])
        kv = F.linear(tokens, weight[channels:], bias[channels:])
        q = q.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = kv.unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v)  # [B, heads, 1, C/heads]
        return F.linear(h.flatten(1), self.c_proj.weight[:, :, 0], self.c_proj.bias)


def pointwise(conv: nn.Conv1d, tokens: Tensor) -> Tensor:
    """A kernel-size-1 `conv` on channels-last tokens (B, T, C), as a matrix product."""
    return F.linear(tokens, conv.weight[:, :, 0], conv.bias)


def count_heads(channels: int, num_heads: int, num_head_channels: int) -> int:
    """Number of attention heads: `num_head_channels`, where it is not -1, decides, else `num_heads`."""
    if num_head_channels == -1:
        if num_heads < 1 or channels % num_heads:
            raise ValueError(f"num_heads must divide the {channels} attention channels, got {num_heads}")
        return num_heads
    if num_head_channels < 1 or channels % num_head_channels:
        raise ValueError(f"num_head_channels must divide the {channels} attention channels, got {num_head_channels}")
    return channels // num_head_channels
