"""`MLPModel`, a noise prediction network for points and for flattened images.

Checkpoints carry a copy of this file, so it needs only torch and diffusers.
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
    section 5, with the axis-aligned B of positional encoding). Without it, an MLP of few inputs learns only low
    frequencies; thin curves need high ones.

    One matrix product and one sine embed all coordinates, with cos(z) = sin(z + π/2): at these sizes, the cost is the
    number of operations.

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
        """Embed `[batch, D]` to `[batch, D * embedding_dim]`."""
        return torch.sin(F.linear(v, self.B, self.phases))


class PartlyEmbedded(nn.Module):
    """`FourierFeatures` of the first coordinates, followed by all coordinates as they are."""

    def __init__(self, num_embedded: int, embedding_dim: int):
        super().__init__()
        self.num_embedded = num_embedded
        self.features = FourierFeatures(num_embedded, embedding_dim) if num_embedded else None

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        """Embed `[batch, D]` to `[batch, num_embedded * embedding_dim + D]`."""
        if self.features is None:
            return v
        return torch.cat([self.features(v[:, : self.num_embedded]), v], dim=1)


class ResidualBlock(nn.Module):
    """Residual block h + silu(W h + b(t)), whose bias b is computed from the timestep, separately for each block."""

    def __init__(self, hidden_dim: int):
        super().__init__()
        self.linear = nn.Linear(hidden_dim, hidden_dim, bias=False)

    def forward(self, h: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        # addmm adds the bias, [1 or batch, hidden_dim], within the matrix product. In sampling, all samples share one
        # timestep, so that the bias is one row and costs no more than that of an ordinary layer.
        return h + F.silu(torch.addmm(bias, h, self.linear.weight.t()))


class ScaledBlock(nn.Module):
    """Residual block h + silu(W (1 + a(t)) norm(h) + b(t)), with a scale and a bias of the timestep for each block.

    An image needs it: how much of the input counts differs more from timestep to timestep than for points.
    """

    def __init__(self, hidden_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_dim)
        self.linear = nn.Linear(hidden_dim, hidden_dim, bias=False)

    def forward(self, h: torch.Tensor, of_timestep: torch.Tensor) -> torch.Tensor:
        scale, bias = of_timestep.chunk(2, dim=-1)  # each [1 or batch, hidden_dim]
        return h + F.silu(self.linear(self.norm(h) * (1 + scale)) + bias)


class PixelPosterior(nn.Module):
    r"""The mean of x_0 given x_t, of pixels that are mostly near −1 or 1.

    If a pixel x_0 is −1 or 1, with log odds 2l before x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε is seen, its mean after that is
    tanh(l + s_t x_t) with s_t = √ᾱ_t / (1 − ᾱ_t), by Bayes' rule. So what a pixel of x_t says of itself takes no width
    of the network, which has to say l: what the other pixels say of it. Grey values take a share g of c_t x_t instead:
    x̂_0 = (1 − g) tanh(l + s_t x_t) + g c_t x_t. l, g, s_t and c_t are all learned.

    Args:
        embedding_dim: size of the timestep's embedding.
        num_pixels: number of values in an image.
    """

    MAX_LOG_EVIDENCE = 4.0  # s_t grows without bounds where x_t has no noise

    def __init__(self, embedding_dim: int, num_pixels: int):
        super().__init__()
        self.of_timestep = nn.Linear(embedding_dim, num_pixels + 2)
        nn.init.zeros_(self.of_timestep.weight)
        nn.init.zeros_(self.of_timestep.bias)

    def forward(self, x_t: torch.Tensor, output: torch.Tensor, t_emb: torch.Tensor) -> torch.Tensor:
        """Return x̂_0, `[batch, num_pixels]`, from x_t and the network's output, `[batch, 2 · num_pixels]`."""
        num_pixels = x_t.shape[1]
        log_odds, gate = output.float().split(num_pixels, dim=1)
        gate_bias, scale, log_evidence = self.of_timestep(t_emb).float().split([num_pixels, 1, 1], dim=1)
        evidence = log_evidence.clamp(max=self.MAX_LOG_EVIDENCE).exp()
        mean = torch.tanh(log_odds + evidence * x_t)
        x_0 = mean + torch.sigmoid(gate + gate_bias) * ((1 + scale) * x_t - mean)
        return x_0.to(x_t.dtype)


class ConditionEmbedding(nn.Module):
    """Embed conditions, `[batch, condition_dim]`, to `[batch, out_dim]`. A row of NaN has a learned embedding."""

    def __init__(self, condition_dim: int, out_dim: int, embedding_dim: int = 16):
        super().__init__()
        self.features = FourierFeatures(condition_dim, embedding_dim, max_frequency=4.0)
        self.mlp = TimestepEmbedding(condition_dim * (embedding_dim + 1), out_dim)
        self.null = nn.Parameter(torch.zeros(out_dim))

    def forward(self, condition: torch.Tensor) -> torch.Tensor:
        is_missing = condition.isnan().any(dim=1, keepdim=True)
        c = torch.where(is_missing, 0.0, condition)
        return torch.where(is_missing, self.null, self.mlp(torch.cat([c, self.features(c)], dim=1)))


class KnownEmbedding(nn.Module):
    """Let a network see known coordinates as they are, in place of their noisy values in x_t, and which these are."""

    def __init__(self, num_coordinates: int, out_dim: int):
        super().__init__()
        self.of_mask = nn.Linear(num_coordinates, out_dim, bias=False)

    def forward(self, x_t: torch.Tensor, known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x_t with the known coordinates, `[batch, num_coordinates]`, NaN where unknown, and an embedding."""
        is_unknown = known.isnan()
        return torch.where(is_unknown, x_t, known), self.of_mask((~is_unknown).to(x_t.dtype))


class MLPModel(ModelMixin, ConfigMixin):
    r"""
    A noise prediction network for vectors of any dimension, mainly 2-D points, and for flattened images.

    Residual blocks combine the sample with the timestep's sinusoidal embedding (Ho et al. 2020,
    https://arxiv.org/abs/2006.11239, appendix B). Coordinates of points are embedded by `FourierFeatures`; pixels are
    used as they are, in normalised blocks. Embeddings of labels and conditions are added to the input of the first
    block, so that in sampling the timestep's embedding remains one row for the whole batch.

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
            Dimension of the prediction, or number of its channels; defaults to `in_channels`. With twice as many, the
            network also predicts the variance, as a `DDPMScheduler` with `learned_range` needs it.
        num_class_embeds (`int`, *optional*):
            Number of classes. The class `num_class_embeds` itself, one beyond the last, stands for "no label"; it is
            learned like the others.
        condition_dim (`int`, *optional*):
            Size of the condition. A row of NaN stands for "no condition", which has a learned embedding.
        takes_known (`bool`, defaults to `False`):
            Whether the condition is a sample itself, of which some coordinates are known, and the others NaN. Its size
            is then `in_channels`.
        num_embedded (`int`, *optional*):
            Number of a point's coordinates, the first ones, that `FourierFeatures` embed; by default all. The others
            are used as they are, which suffices for coordinates of two values.
        pixel_posterior (`bool`, defaults to `False`):
            Whether the output is that of [`PixelPosterior`], for images and a scheduler of `prediction_type="sample"`.
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
        num_class_embeds: int | None = None,
        condition_dim: int | None = None,
        pixel_posterior: bool = False,
        takes_known: bool = False,
        num_embedded: int | None = None,
    ):
        super().__init__()
        sizes = {"in_channels": in_channels, "hidden_dim": hidden_dim, "num_hidden_layers": num_hidden_layers}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if embedding_dim < 4 or embedding_dim % 2:
            raise ValueError(f"embedding_dim must be even and at least 4, got {embedding_dim}")

        if takes_known and (sample_size is not None or condition_dim != in_channels):
            raise ValueError("takes_known is for points, and needs a condition_dim of in_channels")
        num_embedded = in_channels if num_embedded is None else num_embedded
        if not 0 <= num_embedded <= in_channels:
            raise ValueError(f"num_embedded must be at least 0 and at most in_channels, got {num_embedded}")

        self.out_channels = out_channels or in_channels
        if pixel_posterior and (sample_size is None or self.out_channels != in_channels):
            raise ValueError("pixel_posterior is for images, and without a learned variance")
        self.time_proj = Timesteps(embedding_dim, flip_sin_to_cos=False, downscale_freq_shift=0)
        block: type[nn.Module]
        if sample_size is None:
            block, time_dim, per_layer = ResidualBlock, hidden_dim, hidden_dim
            self.embedding: nn.Module = FourierFeatures(in_channels, embedding_dim)
            num_pixels, embedded_dim = 1, in_channels * embedding_dim
            if num_embedded < in_channels:
                self.embedding = PartlyEmbedded(num_embedded, embedding_dim)
                embedded_dim = num_embedded * embedding_dim + in_channels
        else:
            height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
            # A timestep is one number: wider embeddings of it would be most of a wide network's parameters.
            block, time_dim, per_layer = ScaledBlock, min(hidden_dim, 128), 2 * hidden_dim
            self.embedding = nn.Identity()
            num_pixels, embedded_dim = height * width, in_channels * height * width
        self.time_embedding = TimestepEmbedding(embedding_dim, time_dim, out_dim=per_layer * num_hidden_layers)
        self.proj_in = nn.Linear(embedded_dim, hidden_dim)
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds + 1, hidden_dim)
        embedding: type[nn.Module] = KnownEmbedding if takes_known else ConditionEmbedding
        self.condition_embedding = None if condition_dim is None else embedding(condition_dim, hidden_dim)
        self.blocks = nn.ModuleList(block(hidden_dim) for _ in range(num_hidden_layers))
        self.norm_out = nn.Identity() if sample_size is None else nn.LayerNorm(hidden_dim)
        num_outputs = self.out_channels * num_pixels
        self.proj_out = nn.Linear(hidden_dim, 2 * num_outputs if pixel_posterior else num_outputs)
        self.posterior = PixelPosterior(embedding_dim, num_outputs) if pixel_posterior else None

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
            sample (`torch.Tensor`): x_t, `[batch, in_channels]` or `[batch, in_channels, height, width]`.
            timestep (`torch.Tensor`, `int` or `float`): t, one for all (a number or a 0-d tensor) or `[batch]`.
            class_labels (`torch.Tensor`, *optional*): int64, `[batch]`; `num_class_embeds` for samples without one.
            condition (`torch.Tensor`, *optional*): `[batch, condition_dim]`; rows of NaN for samples without one. With
                `takes_known`, NaN for each unknown coordinate.
            return_dict (`bool`, defaults to `True`): whether to return a `UNet2DOutput` rather than a tuple.

        Returns:
            `UNet2DOutput` or `tuple`: its `sample` is ε, shaped like the input except for the number of channels.

        Raises:
            ValueError: if the network has no embedding for the labels or conditions given.
        """
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1)
        t_emb = self.time_proj(timestep).to(self.dtype)  # [1 or batch, embedding_dim], computed in float32
        of_timestep = self.time_embedding(t_emb).chunk(len(self.blocks), dim=-1)

        x_t = sample.flatten(start_dim=1)
        if class_labels is not None and self.class_embedding is None:
            raise ValueError("class_labels: this network was made without num_class_embeds")
        if condition is not None and self.condition_embedding is None:
            raise ValueError("condition: this network was made without condition_dim")
        if self.condition_embedding is not None and condition is None:
            condition = sample.new_full((1, self.config.condition_dim), math.nan)
        if isinstance(self.condition_embedding, KnownEmbedding):
            seen, of_known = self.condition_embedding(x_t, condition)
            h = self.proj_in(self.embedding(seen)) + of_known
        else:
            h = self.proj_in(self.embedding(x_t))
        if self.class_embedding is not None:
            if class_labels is None:
                class_labels = torch.full((1,), self.config.num_class_embeds, device=sample.device)
            h = h + self.class_embedding(class_labels)
        if isinstance(self.condition_embedding, ConditionEmbedding):
            h = h + self.condition_embedding(condition)
        for block, own in zip(self.blocks, of_timestep, strict=True):
            h = block(h, own)
        output = self.proj_out(self.norm_out(h))
        if self.posterior is not None:
            output = self.posterior(x_t, output, t_emb)
        eps = output.reshape(-1, self.out_channels, *sample.shape[2:])

        return UNet2DOutput(sample=eps) if return_dict else (eps,)
