"""ADM networks: the UNet that predicts noise and the half UNet that classifies noisy images.

Architecture, constructor keywords and state-dict keys are those of openai/guided-diffusion (Dhariwal & Nichol, 2021,
arXiv 2105.05233).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .blocks import (
    AttentionBlock,
    AttentionPool2d,
    Downsample,
    GroupNorm32,
    ResBlock,
    Upsample,
    timestep_embedding,
    zero_init,
)

POOLS = ("adaptive", "attention", "spatial", "spatial_v2")


class TimestepSequential(nn.Sequential):
    """A sequence of layers whose residual blocks also take the embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class _Encoder(nn.Module):
    """What UNet and EncoderUNet share: the embedding, the way down, the middle, and the choice of dtype."""

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float,
        channel_mult: Sequence[float],
        conv_resample: bool,
        dims: int,
        num_classes: int | None,
        use_checkpoint: bool,
        num_heads: int,
        num_head_channels: int,
        use_scale_shift_norm: bool,
        resblock_updown: bool,
        use_new_attention_order: bool,
    ):
        super().__init__()
        if dims != 2:
            raise ValueError(f"dims must be 2 (images), got {dims}")
        widths = [int(mult * model_channels) for mult in channel_mult]
        if not widths or any(width < 1 or width % 32 for width in widths):
            raise ValueError(
                "model_channels times each of channel_mult must be a positive multiple of 32 (the normalisation "
                f"groups), got model_channels={model_channels}, channel_mult={tuple(channel_mult)}"
            )
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.use_checkpoint = use_checkpoint
        self._downsampling = 2 ** (len(widths) - 1)
        self._emb_channels = 4 * model_channels
        self._block_options = {"dropout": dropout, "use_scale_shift_norm": use_scale_shift_norm}
        self._head_options = {
            "num_head_channels": num_head_channels,
            "use_new_attention_order": use_new_attention_order,
        }

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, self._emb_channels),
            nn.SiLU(inplace=True),
            nn.Linear(self._emb_channels, self._emb_channels),
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, self._emb_channels)

        channels, rate = widths[0], 1
        blocks = [TimestepSequential(nn.Conv2d(in_channels, channels, 3, padding=1))]
        # channels that each input block puts out: what the way up, or spatial pooling, takes in
        self._skip_channels = [channels]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                layers = [self._res_block(channels, width)]
                channels = width
                if rate in attention_resolutions:
                    layers.append(self._attention(channels, num_heads))
                blocks.append(TimestepSequential(*layers))
                self._skip_channels.append(channels)
            if level < len(widths) - 1:
                down = (
                    self._res_block(channels, channels, down=True)
                    if resblock_updown
                    else Downsample(channels, conv_resample)
                )
                blocks.append(TimestepSequential(down))
                self._skip_channels.append(channels)
                rate *= 2
        self.input_blocks = nn.ModuleList(blocks)
        self.middle_block = TimestepSequential(
            self._res_block(channels, channels),
            self._attention(channels, num_heads),
            self._res_block(channels, channels),
        )

    def _res_block(self, channels: int, out_channels: int, **options: bool) -> ResBlock:
        return ResBlock(channels, self._emb_channels, out_channels=out_channels, **self._block_options, **options)

    def _attention(self, channels: int, num_heads: int) -> AttentionBlock:
        return AttentionBlock(channels, num_heads, **self._head_options)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the torso's convolutions compute in."""
        return self.input_blocks[0][0].weight.dtype

    def _torso(self) -> list[nn.Module]:
        return [self.input_blocks, self.middle_block]

    def convert_dtype(self, dtype: torch.dtype) -> _Encoder:
        """Cast the torso's convolutions to `dtype` (float32, float16, bfloat16), in place, and return the model.

        Normalisation, embeddings and the output head keep fp32: this is guided-diffusion's `use_fp16`, for any dtype.
        """
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"dtype must be torch.float32, torch.float16 or torch.bfloat16, got {dtype}")
        for part in self._torso():
            for module in part.modules():
                if isinstance(module, (nn.Conv1d, nn.Conv2d)):
                    module.to(dtype)
        return self

    def convert_to_fp16(self) -> None:
        """guided-diffusion's name for `convert_dtype(torch.float16)`."""
        self.convert_dtype(torch.float16)

    def convert_to_fp32(self) -> None:
        """guided-diffusion's name for `convert_dtype(torch.float32)`."""
        self.convert_dtype(torch.float32)

    def _check_input(self, x: Tensor, timesteps: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must have shape (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        if x.shape[2] % self._downsampling or x.shape[3] % self._downsampling:
            raise ValueError(
                f"x must have height and width divisible by {self._downsampling}, got {x.shape[2]}x{x.shape[3]}"
            )
        if timesteps.shape != x.shape[:1]:
            raise ValueError(f"timesteps must have shape ({x.shape[0]},), got {tuple(timesteps.shape)}")

    def _embed(self, timesteps: Tensor) -> Tensor:
        embedding = timestep_embedding(timesteps, self.model_channels)
        return self.time_embed(embedding.to(self.time_embed[0].weight.dtype))

    def _run(self, block: TimestepSequential, h: Tensor, emb: Tensor) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(block, h, emb, use_reentrant=False)
        return block(h, emb)


class UNet(_Encoder):
    """The ADM UNet: `model(x, timesteps, y)` -> ε̂, or ε̂ and v where `out_channels` is twice `in_channels`.

    Args:
        image_size: height and width the model is meant for, in pixels.
        in_channels: channels of the input images.
        model_channels: width at channel multiplier 1; the embedding is 4 times as wide.
        out_channels: channels of the output.
        num_res_blocks: residual blocks per level.
        attention_resolutions: downsampling rates (not pixels) at which attention follows each residual block.
        dropout: probability of dropping an activation in training.
        channel_mult: width of each level over `model_channels`, from the finest; may be fractional.
        conv_resample: resample by learned convolutions where `resblock_updown` is off.
        dims: 2; other numbers of dimensions are an error.
        num_classes: number of labels of a class-conditional model; None for an unconditional one.
        use_checkpoint: recompute activations in the backward pass to save memory.
        use_fp16: build the torso's convolutions in fp16; see `convert_dtype`.
        num_heads: attention heads where `num_head_channels` is -1.
        num_head_channels: channels per attention head.
        num_heads_upsample: `num_heads` of the way up; -1 for the same.
        use_scale_shift_norm: condition by scale and shift after normalisation rather than by a sum before it.
        resblock_updown: resample inside residual blocks.
        use_new_attention_order: see `AttentionBlock`.

    Raises:
        ValueError: for widths that 32 normalisation groups or the heads do not divide, and for `dims` other than 2.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ):
        super().__init__(
            image_size=image_size,
            in_channels=in_channels,
            model_channels=model_channels,
            out_channels=out_channels,
            num_res_blocks=num_res_blocks,
            attention_resolutions=attention_resolutions,
            dropout=dropout,
            channel_mult=channel_mult,
            conv_resample=conv_resample,
            dims=dims,
            num_classes=num_classes,
            use_checkpoint=use_checkpoint,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            use_new_attention_order=use_new_attention_order,
        )
        self.num_classes = num_classes
        if num_heads_upsample == -1:
            num_heads_upsample = num_heads

        skip_channels = list(self._skip_channels)
        channels, rate = skip_channels[-1], self._downsampling
        blocks = []
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                width = int(mult * model_channels)
                layers = [self._res_block(channels + skip_channels.pop(), width)]
                channels = width
                if rate in attention_resolutions:
                    layers.append(self._attention(channels, num_heads_upsample))
                if level > 0 and i == num_res_blocks:
                    layers.append(
                        self._res_block(channels, channels, up=True)
                        if resblock_updown
                        else Upsample(channels, conv_resample)
                    )
                    rate //= 2
                blocks.append(TimestepSequential(*layers))
        self.output_blocks = nn.ModuleList(blocks)
        self.out = nn.Sequential(
            GroupNorm32(channels),
            nn.SiLU(inplace=True),
            zero_init(nn.Conv2d(channels, out_channels, 3, padding=1)),
        )
        if use_fp16:
            self.convert_dtype(torch.float16)

    @property
    def class_conditional(self) -> bool:
        """Whether `forward` needs labels."""
        return self.num_classes is not None

    def _torso(self) -> list[nn.Module]:
        return [*super()._torso(), self.output_blocks]

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict the noise of x_t.

        Args:
            x: (B, in_channels, H, W) noisy images, H and W divisible by the model's downsampling.
            timesteps: (B,) original timesteps, integer or fractional.
            y: (B,) integer labels in 0..num_classes-1, given if and only if the model is class-conditional.

        Returns:
            (B, out_channels, H, W) in the output head's dtype: fp32, unless the whole module was cast.

        Raises:
            ValueError: for shapes that do not fit, labels missing or not wanted, or labels that are not integers.
        """
        self._check_input(x, timesteps)
        emb = self._embed(timesteps)
        if self.class_conditional:
            if y is None:
                raise ValueError("y is missing: the model is class-conditional and needs labels of shape (B,)")
            if y.shape != x.shape[:1] or y.dtype not in (torch.int64, torch.int32):
                raise ValueError(
                    f"y must be int64 or int32 labels of shape ({x.shape[0]},), got {y.dtype} {tuple(y.shape)}"
                )
            emb = emb + self.label_emb(y)
        elif y is not None:
            raise ValueError("y was given, but the model is unconditional (num_classes=None)")
        emb = F.silu(emb)

        h = x.to(self.dtype)
        skips = []
        for block in self.input_blocks:
            h = self._run(block, h, emb)
            skips.append(h)
        h = self._run(self.middle_block, h, emb)
        for block in self.output_blocks:
            h = self._run(block, torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h.to(self.out[2].weight.dtype))


class EncoderUNet(_Encoder):
    """The ADM classifier of noisy images: `classifier(x_t, timesteps)` -> logits.

    Keywords are those of `UNet` but for `num_classes`; `out_channels` is the number of classes, also found as
    `num_classes`. `num_heads_upsample` is accepted, as guided-diffusion does, and means nothing here.

    Args:
        pool: "adaptive" (mean of the last feature map), "attention" (see `AttentionPool2d`; needs
            `num_head_channels`), "spatial" or "spatial_v2" (means of every block's feature map, then an MLP).

    Raises:
        ValueError: as `UNet`, and for an unknown `pool` or attention pooling without `num_head_channels`.
    """

    class_conditional = False

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
    ):
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
        if pool == "attention" and num_head_channels == -1:
            raise ValueError("pool='attention' needs num_head_channels, got -1")
        super().__init__(
            image_size=image_size,
            in_channels=in_channels,
            model_channels=model_channels,
            out_channels=out_channels,
            num_res_blocks=num_res_blocks,
            attention_resolutions=attention_resolutions,
            dropout=dropout,
            channel_mult=channel_mult,
            conv_resample=conv_resample,
            dims=dims,
            num_classes=None,
            use_checkpoint=use_checkpoint,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            use_new_attention_order=use_new_attention_order,
        )
        self.num_classes = out_channels
        self.pool = pool
        channels = self._skip_channels[-1]
        if pool == "adaptive":
            self.out = nn.Sequential(
                GroupNorm32(channels),
                nn.SiLU(inplace=True),
                nn.AdaptiveAvgPool2d(1),
                zero_init(nn.Conv2d(channels, out_channels, 1)),
                nn.Flatten(),
            )
        elif pool == "attention":
            size = image_size // self._downsampling
            pooling = AttentionPool2d(size, channels, num_head_channels, out_channels)
            self.out = nn.Sequential(GroupNorm32(channels), nn.SiLU(inplace=True), pooling)
        else:
            features = sum(self._skip_channels) + channels
            activation = [nn.ReLU()] if pool == "spatial" else [GroupNorm32(2048), nn.SiLU(inplace=True)]
            self.out = nn.Sequential(nn.Linear(features, 2048), *activation, nn.Linear(2048, out_channels))
        if use_fp16:
            self.convert_dtype(torch.float16)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Classify x_t.

        Args:
            x: (B, in_channels, H, W) noisy images; attention pooling wants H = W = image_size.
            timesteps: (B,) original timesteps, integer or fractional.

        Returns:
            (B, num_classes) logits in the output head's dtype: fp32, unless the whole module was cast.

        Raises:
            ValueError: for shapes that do not fit.
        """
        self._check_input(x, timesteps)
        emb = F.silu(self._embed(timesteps))
        # a norm or a linear layer: whatever the pool, the head starts with a weight
        head_dtype = self.out[0].weight.dtype
        spatial = self.pool.startswith("spatial")
        features = []
        h = x.to(self.dtype)
        for block in [*self.input_blocks, self.middle_block]:
            h = self._run(block, h, emb)
            if spatial:
                features.append(h.to(head_dtype).mean(dim=(2, 3)))
        return self.out(torch.cat(features, dim=1) if spatial else h.to(head_dtype))
