"""`SmallUNet2DModel`, a noise prediction network for small images that is fast on CPUs.

Checkpoints carry a copy of this file, so it needs only torch and diffusers.
"""

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn


class ConditionEmbedding(nn.Module):
    """Embed conditions, `[batch, condition_dim]`, to `[batch, out_dim]`. A row of NaN has a learned embedding."""

    def __init__(self, condition_dim: int, out_dim: int):
        super().__init__()
        self.mlp = TimestepEmbedding(condition_dim, out_dim)
        self.null = nn.Parameter(torch.zeros(out_dim))

    def forward(self, condition: torch.Tensor) -> torch.Tensor:
        is_missing = condition.isnan().any(dim=1, keepdim=True)
        return torch.where(is_missing, self.null, self.mlp(torch.where(is_missing, 0.0, condition)))


class SmallUNet2DModel(ModelMixin, ConfigMixin):
    r"""
    A U-Net for images of any size and any number of channels, designed for speed on CPUs.

    On small images, a stock `UNet2DModel` spends most of its time in 3×3 convolutions at full resolution. Here, the
    first convolution has a stride of `patch_size` and the last, transposed one restores the resolution, so that all
    others run at a lower one.

    Parameters:
        sample_size (`int` or `tuple[int, int]`, defaults to 28):
            Height and width of the images, of any size: the model pads and crops internally.
        in_channels (`int`, defaults to 1):
            Number of channels of the images.
        out_channels (`int`, *optional*):
            Number of channels of the prediction; defaults to `in_channels`.
        patch_size (`int`, defaults to 2):
            Stride of the first and the last convolution, whose kernels cover 3×3 patches of this size.
        block_out_channels (`tuple[int, ...]`, defaults to `(32, 64, 128)`):
            Width at each resolution, from the highest; each has half the height and width of the one before.
        layers_per_block (`int`, defaults to 1):
            Number of residual blocks at each resolution, in the down and again in the up blocks.
        attention (`bool`, defaults to `True`):
            Whether there is self-attention in the middle, at the lowest resolution.
        attention_head_dim (`int`, defaults to 32):
            Width of an attention head.
        time_conditioning (`"every_block"` or `"once"`, defaults to `"every_block"`):
            Where the timestep enters: in every residual block, or once, after the stem.
        skip_connections (`"add"` or `"concat"`, defaults to `"add"`):
            How an up block takes what the down block of its resolution has found: added to its input, or concatenated
            with it, as in the U-Net of Ho et al. 2020, which makes the block's first convolution twice as large.
        norm_num_groups (`int`, defaults to 8):
            Number of groups of the group norms; divides every width.
        num_class_embeds (`int`, *optional*):
            Number of classes. The class `num_class_embeds` itself, one beyond the last, stands for "no label"; it is
            learned like the others. Labels are added to the timestep's embedding, as in `UNet2DModel`.
        condition_dim (`int`, *optional*):
            Size of the condition, which is added to the timestep's embedding. A row of NaN stands for "no condition",
            which has a learned embedding.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 28,
        in_channels: int = 1,
        out_channels: int | None = None,
        patch_size: int = 2,
        block_out_channels: tuple[int, ...] = (32, 64, 128),
        layers_per_block: int = 1,
        attention: bool = True,
        attention_head_dim: int = 32,
        time_conditioning: str = "every_block",
        skip_connections: str = "add",
        norm_num_groups: int = 8,
        num_class_embeds: int | None = None,
        condition_dim: int | None = None,
    ):
        super().__init__()
        if time_conditioning not in ("every_block", "once"):
            raise ValueError(f"time_conditioning must be 'every_block' or 'once', got {time_conditioning!r}")
        if skip_connections not in ("add", "concat"):
            raise ValueError(f"skip_connections must be 'add' or 'concat', got {skip_connections!r}")
        for name, value in (("in_channels", in_channels), ("patch_size", patch_size), ("layers", layers_per_block)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if any(width % norm_num_groups for width in block_out_channels):
            raise ValueError(
                f"block_out_channels {block_out_channels} must be multiples of norm_num_groups, {norm_num_groups}"
            )
        if attention and block_out_channels[-1] % attention_head_dim:
            raise ValueError(
                f"the last of block_out_channels, {block_out_channels[-1]}, must be a multiple of attention_head_dim, "
                f"{attention_head_dim}"
            )
        first, last = block_out_channels[0], block_out_channels[-1]
        time_dim = 4 * first
        temb_channels = time_dim if time_conditioning == "every_block" else None

        def resnets(width: int, in_channels: int) -> nn.ModuleList:
            options = {"out_channels": width, "temb_channels": temb_channels, "groups": norm_num_groups}
            blocks = [ResnetBlock2D(in_channels=in_channels, **options)]
            blocks += [ResnetBlock2D(in_channels=width, **options) for _ in range(layers_per_block - 1)]
            for block in blocks:
                _zero(block.conv2)
            return nn.ModuleList(blocks)

        self.time_proj = Timesteps(first, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(first, time_dim, out_dim=None if temb_channels else first)
        embedding_dim = time_dim if temb_channels else first
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds + 1, embedding_dim)
        self.condition_embedding = None if condition_dim is None else ConditionEmbedding(condition_dim, embedding_dim)
        patches = (3 * patch_size, patch_size, patch_size)  # kernel, stride and padding
        self.conv_in = nn.Conv2d(in_channels, first, *patches)
        self.down_blocks, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        self.up_blocks, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        for width, next_width in zip(block_out_channels, (*block_out_channels[1:], None), strict=True):
            self.down_blocks.append(resnets(width, width))
            self.up_blocks.insert(0, resnets(width, 2 * width if skip_connections == "concat" else width))
            if next_width is not None:
                self.downsamplers.append(nn.Conv2d(width, next_width, kernel_size=2, stride=2))
                self.upsamplers.insert(0, nn.ConvTranspose2d(next_width, width, kernel_size=2, stride=2))
        self.mid_attention = None
        if attention:
            self.mid_attention = Attention(
                last,
                heads=last // attention_head_dim,
                dim_head=attention_head_dim,
                norm_num_groups=norm_num_groups,
                residual_connection=True,
                bias=True,
                upcast_softmax=True,
                processor=AttnProcessor(),  # torch's fused attention is slower for so few tokens
                _from_deprecated_attn_block=True,
            )
            _zero(self.mid_attention.to_out[0])
        self.norm_out = nn.GroupNorm(norm_num_groups, first)
        out_channels = in_channels if out_channels is None else out_channels
        self.conv_out = nn.ConvTranspose2d(first, out_channels, *patches)
        _zero(self.conv_out)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        r"""
        Predict the noise ε in `sample`.

        Args:
            sample (`torch.Tensor`): x_t, `[batch, in_channels, height, width]`, of any height and width.
            timestep (`torch.Tensor`, `int` or `float`): t, one for all (a number or a 0-d tensor) or `[batch]`.
            class_labels (`torch.Tensor`, *optional*): int64, `[batch]`; `num_class_embeds` for samples without one.
            condition (`torch.Tensor`, *optional*): `[batch, condition_dim]`; rows of NaN for samples without one.
            return_dict (`bool`, defaults to `True`): whether to return a `UNet2DOutput` rather than a tuple.

        Returns:
            `UNet2DOutput` or `tuple`: its `sample` is ε, with the height and width of the input.

        Raises:
            ValueError: if the network has no embedding for the labels or conditions given.
        """
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1)
        temb = self.time_embedding(self.time_proj(timestep).to(self.dtype))  # [1 or batch, time_dim]

        if class_labels is not None and self.class_embedding is None:
            raise ValueError("class_labels: this network was made without num_class_embeds")
        if condition is not None and self.condition_embedding is None:
            raise ValueError("condition: this network was made without condition_dim")
        if self.class_embedding is not None:
            if class_labels is None:
                class_labels = torch.full((1,), self.config.num_class_embeds, device=sample.device)
            temb = temb + self.class_embedding(class_labels)
        if self.condition_embedding is not None:
            if condition is None:
                condition = sample.new_full((1, self.config.condition_dim), math.nan)
            temb = temb + self.condition_embedding(condition)

        height, width = sample.shape[-2:]
        multiple = self.config.patch_size * 2 ** len(self.downsamplers)
        # Not −length % multiple: inductor can't compile the remainder of a negative size.
        right, below = ((multiple - length % multiple) % multiple for length in (width, height))
        h = self.conv_in(F.pad(sample, (0, right, 0, below)))
        if self.config.time_conditioning == "once":
            h, temb = h + temb[:, :, None, None], None

        skips = []
        for i, resnets in enumerate(self.down_blocks):
            if i > 0:
                h = self.downsamplers[i - 1](h)
            for resnet in resnets:  # type: ignore[attr-defined]  # a ModuleList
                h = resnet(h, temb)
            skips.append(h)
        if self.mid_attention is not None:
            # Attention transposes its tokens back to pixels: channels last. All that follows would keep that layout,
            # in which torch's group norm takes ten times as long on a CPU in bfloat16.
            h = self.mid_attention(h).contiguous()
        for i, resnets in enumerate(self.up_blocks):
            if i > 0:
                h = self.upsamplers[i - 1](h)
            h = torch.cat([h, skips.pop()], dim=1) if self.config.skip_connections == "concat" else h + skips.pop()
            for resnet in resnets:  # type: ignore[attr-defined]  # a ModuleList
                h = resnet(h, temb)

        eps = self.conv_out(F.silu(self.norm_out(h)))[..., :height, :width]
        return UNet2DOutput(sample=eps) if return_dict else (eps,)


def _zero(layer: nn.Conv2d | nn.ConvTranspose2d | nn.Linear) -> None:
    """Set a layer's weights to zero, so that blocks start as the identity and ε_θ at 0 (code of Ho et al. 2020)."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
