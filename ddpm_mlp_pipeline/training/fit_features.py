"""What samples and data are compared on while a table is fitted: coordinates, or the network's own activations."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from ..data.batches import Batch, KnownBatches
from ..errors import ConfigurationError
from ..models.mlp import MLPModel
from ..pipeline import DDPMMLPPipeline
from ..runtime.columns import TableCodec

LOG_SNRS = (5.3, 2.2)  # log(ᾱ / (1 − ᾱ)) of the noised images: fine detail, and shape
FEW_COORDINATES = 16  # up to which cdist is faster than products of matrices
MAX_WHITENED = 2**16  # data that their covariance is estimated from
TINY = 1e-12
MIN_VARIANCE = 1e-3  # of a whitened direction, as a share of the largest
CLASS_DISTANCE = 2.0  # between the points of two classes, in standard deviations


class FitFeatures(Protocol):
    """A differentiable φ."""

    def __call__(self, batch: Batch, generator: torch.Generator) -> list[torch.Tensor]:
        """Return groups of features, each `[batch, features]`, whose distances are added up."""


class PointFeatures:
    """Coordinates in the network's units, with the label and the condition beside them.

    The distance then compares the joint distributions, so that a table is fitted to what the data are under each
    condition.

    Columns of a table can hang together so closely that noise which is small beside each column's spread destroys what
    ties them. Such numbers are compared a second time, whitened, so that each direction counts as much.

    Args:
        num_classes: number of classes; 0 for data without labels.
        whitening: `[numbers, numbers]`, which whitens the first coordinates; `None` to compare once.
    """

    def __init__(self, num_classes: int = 0, whitening: torch.Tensor | None = None):
        self.num_classes, self.whitening = num_classes, whitening

    def __call__(self, batch: Batch, generator: torch.Generator) -> list[torch.Tensor]:
        columns = [batch.x_0.flatten(1)]
        if batch.class_labels is not None:
            one_hot = nn.functional.one_hot(batch.class_labels, self.num_classes + 1).to(batch.x_0)
            columns.append(one_hot * (CLASS_DISTANCE / 2**0.5))
        if batch.condition is not None:
            columns.append(batch.condition)
        groups = [torch.cat(columns, dim=1)]
        if self.whitening is not None:
            groups.append(columns[0][:, : len(self.whitening)] @ self.whitening)
        return groups


def whiten(x: torch.Tensor) -> torch.Tensor:
    """Return the matrix by which data, `[number, D]`, are whitened: `[D, D]`.

    Directions of less than a thousandth of the variance are scaled as those of a thousandth.
    """
    variances, directions = torch.linalg.eigh(torch.cov(x.T.double()).reshape(x.shape[1], x.shape[1]))
    return (directions * variances.clamp(min=max(MIN_VARIANCE * float(variances.max()), TINY)).rsqrt()).to(x)


class NetworkFeatures:
    """Inner activations of the checkpoint's own network, on noised images and with their labels.

    No other network is needed: a network that has learned to denoise images knows what they are made of (Baranchuk et
    al. 2021, https://arxiv.org/abs/2112.03126).

    Args:
        pipeline: the pipeline. The features of a U-Net are what its last residual blocks on the way down return, at
            the two lowest resolutions, and its middle; those of an `MLPModel` are of its last two blocks.

    Raises:
        ConfigurationError: if the network is neither.
    """

    def __init__(self, pipeline: DDPMMLPPipeline):
        log_snr = torch.logit(pipeline.scheduler.alphas_cumprod.double())
        self.network = pipeline.unet
        self.timesteps = [int((log_snr - level).abs().argmin()) for level in LOG_SNRS]
        self.alphas_cumprod = [float(pipeline.scheduler.alphas_cumprod[t]) for t in self.timesteps]
        self.blocks = self._choose()

    def _choose(self) -> list[nn.Module]:
        if isinstance(self.network, MLPModel):
            return list(self.network.blocks[-2:])
        stages = getattr(self.network, "down_blocks", [])[-2:]
        resnets = [[block for block in stage.modules() if isinstance(block, ResnetBlock2D)] for stage in stages]
        middle = [getattr(self.network, name, None) for name in ("mid_attention", "mid_block")]
        blocks = [own[-1] for own in resnets if own] + [block for block in middle if block is not None]
        if not blocks:
            raise ConfigurationError(
                f"{type(self.network).__name__} has no residual blocks to take features from: pass --features"
            )
        return blocks

    def __call__(self, batch: Batch, generator: torch.Generator) -> list[torch.Tensor]:
        features = []
        for t, alpha_cumprod in zip(self.timesteps, self.alphas_cumprod, strict=True):
            noise = torch.randn(batch.x_0.shape, generator=generator).to(batch.x_0.device)
            x_t = alpha_cumprod**0.5 * batch.x_0 + (1 - alpha_cumprod) ** 0.5 * noise
            with _outputs(self.blocks) as outputs, contextlib.suppress(_Done):
                self.network(x_t, t, **batch.known)
            features += [output.flatten(1) / output[0].numel() ** 0.5 for output in outputs]
        return features


class Preprocessed:
    """The features of another network, such as a classifier's, on images in the network's units.

    Args:
        network: `[batch, channels, height, width]` in [-1, 1] to `[batch, features]`, differentiable.
    """

    def __init__(self, network: Any):
        self.network = network

    def __call__(self, batch: Batch, generator: torch.Generator) -> list[torch.Tensor]:
        return [self.network(batch.x_0).float()]  # of autocast's bfloat16


def default_features(pipeline: DDPMMLPPipeline, data: KnownBatches) -> FitFeatures:
    """Return coordinates for points, also whitened for tables, and the network's own activations for images."""
    if not pipeline.is_points:
        return NetworkFeatures(pipeline)
    whitening = None
    num_numbers = 0 if pipeline.config.columns is None else TableCodec(pipeline.config.columns).num_numbers
    if num_numbers and len(data) > 1:
        some = range(0, len(data), math.ceil(len(data) / MAX_WHITENED))  # of a file that may be sorted
        whitening = whiten(data.__getitems__([*some]).x_0[:, :num_numbers]).to(pipeline.device)
    return PointFeatures(pipeline.num_classes, whitening)


def energy_distance(
    x: Sequence[torch.Tensor], y: Sequence[torch.Tensor], y_distances: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return 2 E‖x − y‖ − E‖x − x′‖ − E‖y − y′‖, unbiased, summed over groups of features.

    Source: Székely and Rizzo 2013, "Energy statistics". It is 0 if, and only if, the distributions are the same.

    Args:
        x, y: groups of features, each `[number, features]`.
        y_distances: `mean_distance` of each group of y.
    """
    groups = zip(x, y, y_distances, strict=True)
    return torch.stack([2 * _distances(a, b).mean() - mean_distance(a) - of_b for a, b, of_b in groups]).sum()


def mean_distance(x: torch.Tensor) -> torch.Tensor:
    """Return the mean distance of two different rows of x."""
    return _distances(x, x).sum() / (len(x) * (len(x) - 1))


def _distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the distances ‖x − y‖ of all pairs of rows, as `torch.cdist` does."""
    if x.shape[1] <= FEW_COORDINATES:
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    # For many coordinates, cdist takes two and a half times as long: it computes gradients of both arguments, though
    # only samples need one.
    squared = torch.addmm(y.square().sum(dim=1), x, y.T, alpha=-2) + x.square().sum(dim=1, keepdim=True)
    return squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt()


class _Done(Exception):
    """All outputs are there: what would follow of the network isn't needed."""


@contextlib.contextmanager
def _outputs(blocks: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Collect the outputs of some blocks, in the order in which they run, and stop after the last one."""
    outputs: list[torch.Tensor] = []

    def collect(block: nn.Module, args: Any, output: torch.Tensor) -> None:
        outputs.append(output.float())  # of autocast's bfloat16
        if len(outputs) == len(blocks):
            raise _Done

    hooks = [block.register_forward_hook(collect) for block in blocks]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
