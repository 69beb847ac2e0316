"""`MLPModel`, an ε-network for points and for flattened images.

This file needs torch and diffusers only, because a checkpoint carries a copy of it.
"""

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn


class FourierFeatures(nn.Module):
    r"""
    Sinusoidal embedding of coordinates, γ(v) = [sin(Bv), cos(Bv)] (Tancik et al. 2020, https://arxiv.org/abs/2006.10739,
    section 5, with positional encoding's axis-aligned B): an MLP alone learns only the low frequencies of a function
    of few variables, and a thin curve is made of high ones.

    All coordinates are embedded by one matrix product and one sine, cos(z) being sin(z + π/2): at these sizes,
    the number of operations is what an embedding costs.

    Args:
        num_coordinates: number of coordinates, D.
        embedding_dim: size of each coordinate's embedding; even.
        min_frequency, max_frequency: in radians per unit of the normalised data, spaced geometrically.
    """

    B: torch.Tensor
    phases: torch.Tensor

    def __init__(
        self, num_coordinates: int, embedding_dim: int, min_frequency: float = 0.16, max_frequency: float = 16.0
    ):
        super().__init__()
        exponents = torch.linspace(math.log(min_frequency), math.log(max_frequency), embedding_dim // 2)
        frequencies = exponents.exp().repeat(2)
        phases = torch.tensor([0.0, math.pi / 2]).repeat_interleave(embedding_dim // 2)
        B = torch.kron(torch.eye(num_coordinates), frequencies[:, None])  # block diagonal
        self.register_buffer("B", B, persistent=False)  # [D * embedding_dim, D]
        self.register_buffer("phases", phases.repeat(num_coordinates), persistent=False)

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        """[batch, D] to [batch, D * embedding_dim]"""
        return torch.sin(F.linear(v, self.B, self.phases))


class ResidualBlock(nn.Module):
    """h + silu(W h + b(t)): a residual block whose bias is the timestep's, different in every block."""

    def __init__(self, hidden_dim: int):
        super().__init__()
        self.linear = nn.Linear(hidden_dim, hidden_dim, bias=False)

    def forward(self, h: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        # addmm adds the bias, [1 or batch, hidden_dim], within the matrix product. In sampling the timestep is the
        # same for the whole batch, so that its bias is one row, and costs as little as a layer's own.
        return h + F.silu(torch.addmm(bias, h, self.linear.weight.t()))


class MLPModel(ModelMixin, ConfigMixin):
    r"""
    An ε-network for vectors of any dimension, 2-D points above all, and for flattened images.

    The sample, and the timestep by the sinusoidal embedding of Ho et al. 2020 (https://arxiv.org/abs/2006.11239,
    appendix B), meet in residual blocks. Coordinates of points are embedded too ([`FourierFeatures`]); pixels are not.

    Parameters:
        in_channels (`int`, defaults to 2):
            Dimension of the points, or number of an image's channels.
        sample_size (`int` or `tuple[int, int]`, *optional*):
            Height and width of the images; `None` for points.
        embedding_dim (`int`, defaults to 32):
            Size of the timestep's embedding, and of each coordinate's. Even.
        hidden_dim (`int`, defaults to 64):
            Width of the residual blocks.
        num_hidden_layers (`int`, defaults to 4):
            Number of residual blocks.
        out_channels (`int`, *optional*):
            Dimension of the prediction, or number of its channels; by default as many as the samples have. With twice
            as many, the network also predicts the variance, as a `DDPMScheduler` with `learned_range` wants it.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 2,
        sample_size: int | tuple[int, int] | None = None,
        embedding_dim: int = 32,
        hidden_dim: int = 64,
        num_hidden_layers: int = 4,
        out_channels: int | None = None,
    ):
        super().__init__()
        sizes = {"in_channels": in_channels, "hidden_dim": hidden_dim, "num_hidden_layers": num_hidden_layers}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if embedding_dim < 4 or embedding_dim % 2:
            raise ValueError(f"embedding_dim must be even and at least 4, got {embedding_dim}")

        self.out_channels = out_channels or in_channels
        self.time_proj = Timesteps(embedding_dim, flip_sin_to_cos=False, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(embedding_dim, hidden_dim, out_dim=hidden_dim * num_hidden_layers)
        if sample_size is None:
            self.embedding: nn.Module = FourierFeatures(in_channels, embedding_dim)
            num_pixels, embedded_dim = 1, in_channels * embedding_dim
        else:
            height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
            self.embedding = nn.Identity()
            num_pixels, embedded_dim = height * width, in_channels * height * width
        self.proj_in = nn.Linear(embedded_dim, hidden_dim)
        self.blocks = nn.ModuleList(ResidualBlock(hidden_dim) for _ in range(num_hidden_layers))
        self.proj_out = nn.Linear(hidden_dim, self.out_channels * num_pixels)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float, return_dict: bool = True
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        r"""
        Predict the noise ε in `sample`.

        Args:
            sample (`torch.Tensor`): x_t, `[batch, in_channels]` or `[batch, in_channels, height, width]`.
            timestep (`torch.Tensor` or `int` or `float`): t, one for all (a number or a 0-d tensor) or `[batch]`.
            return_dict (`bool`, defaults to `True`): whether to return a `UNet2DOutput` rather than a tuple.

        Returns:
            `UNet2DOutput` or `tuple`: its `sample` is ε, of the shape of the input but for the number of channels.
        """
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1)
        t_emb = self.time_proj(timestep).to(self.dtype)  # [1 or batch, embedding_dim], computed in float32
        biases = self.time_embedding(t_emb).chunk(len(self.blocks), dim=-1)

        h = self.proj_in(self.embedding(sample.flatten(start_dim=1)))
        for block, bias in zip(self.blocks, biases, strict=True):
            h = block(h, bias)
        eps = self.proj_out(h).reshape(-1, self.out_channels, *sample.shape[2:])

        return UNet2DOutput(sample=eps) if return_dict else (eps,)
