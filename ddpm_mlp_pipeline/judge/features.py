"""Features to compare images on: a small classifier's, Inception's, or pixels."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..data.images import to_network_units
from ..errors import explain_missing_extra
from ..loading import check_weights, empty_network, explain_loading

PIXELS, PIXEL_SIZE = "pixels", 32  # name; maximum height and width


class Features(Protocol):
    """A network that turns uint8 images, `[batch, channels, height, width]`, into `[batch, num_features]`."""

    @property
    def channels(self) -> tuple[int, ...]:
        """The accepted numbers of channels."""

    @property
    def num_features(self) -> int | None:
        """The width of the output; `None` if it depends on the images' size."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor: ...

    def state_dict(self) -> dict[str, Any]: ...


class FeatureNetwork(ModelMixin, ConfigMixin):
    r"""
    A convolutional classifier whose `forward` returns the features of its last hidden layer.

    Parameters:
        sample_size (`int`, defaults to 28):
            Height and width that images are resized to.
        in_channels (`int`, defaults to 1):
            Number of the images' channels.
        num_classes (`int`, defaults to 10):
            Number of classes.
        num_features (`int`, defaults to 64):
            Width of the last hidden layer.
        block_out_channels (`tuple[int, ...]`, defaults to `(32, 64, 128)`):
            Width at each resolution, from the highest. Each has half the height and width of the previous one.
        layers_per_block (`int`, defaults to 1):
            Number of convolutions at each resolution.
        mirrored (`bool`, defaults to `False`):
            Whether features are means of an image's and its mirror image's, for data where left and right mean the
            same. The classes' logits are then means, too, since they are linear in the features.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 28,
        in_channels: int = 1,
        num_classes: int = 10,
        num_features: int = 64,
        block_out_channels: tuple[int, ...] = (32, 64, 128),
        layers_per_block: int = 1,
        mirrored: bool = False,
    ):
        super().__init__()
        self.channels = (in_channels,)
        self.num_features = num_features
        blocks: list[nn.Module] = []
        channels = in_channels
        for width in block_out_channels:
            for _ in range(layers_per_block):
                blocks += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            blocks.append(nn.MaxPool2d(2))
        size = sample_size // 2 ** len(block_out_channels)
        self.blocks = nn.Sequential(*blocks, nn.Flatten())
        self.hidden = nn.Linear(block_out_channels[-1] * size**2, num_features)
        self.classifier = nn.Linear(num_features, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        r"""
        Compute the features of images.

        Args:
            images (`torch.Tensor`): uint8, `[batch, in_channels, height, width]`, of any height and width.

        Returns:
            `torch.Tensor`: `[batch, num_features]`.
        """
        x = to_network_units(images).to(self.dtype)
        if self.config.mirrored and not self.training:  # training mirrors at random
            return (self.embed(x) + self.embed(x.flip(-1))) / 2
        return self.embed(x)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the features of images in [-1, 1], `[batch, in_channels, height, width]`, with gradients."""
        size = self.config.sample_size
        if x.shape[-2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        return F.relu(self.hidden(self.blocks(x)))

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Return the most probable class of each image, int64 `[batch]`, from its features."""
        return self.classifier(features.to(self.classifier.weight)).argmax(dim=1)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Compute the classes' logits, `[batch, num_classes]`, of images as in `forward`."""
        return self.classifier(self.forward(images))


class PixelFeatures(nn.Module):
    r"""
    The pixels of images as features. Larger images are averaged down to 32 rows and columns.

    The scale makes the Euclidean distance of two images the root mean square difference of their levels, 0 to 255,
    whatever their size.
    """

    channels = (1, 3, 4)
    num_features = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        r"""Compute the features, `[batch, num_features]`, of images, uint8 `[batch, channels, height, width]`."""
        height, width = (min(length, PIXEL_SIZE) for length in images.shape[-2:])
        pixels = F.adaptive_avg_pool2d(images.float(), (height, width)).flatten(1)
        return pixels / pixels.shape[1] ** 0.5


def load_features(path: str | os.PathLike[str]) -> Features:
    """Load a feature network.

    Args:
        path: the folder of a [`FeatureNetwork`], torch-fidelity's file of Inception's weights, or `"pixels"`.

    Raises:
        CheckpointError: if a file is missing, can't be read, holds anything but the network's weights, or doesn't fit
            the other files.
        MissingExtraError: if the path is a file, but torch-fidelity is not installed.
    """
    if str(path) == PIXELS:
        return PixelFeatures()
    with explain_loading(f"can't load the feature network {path}"):
        if Path(path).is_file():
            return _load_inception(path)
        empty_network(FeatureNetwork, Path(path))
        network = FeatureNetwork.from_pretrained(path, local_files_only=True, use_safetensors=True)
        check_weights(network)
    return network.eval()


def _load_inception(weights: str | os.PathLike[str]) -> Features:
    try:
        torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity would run code in a pickle
    except (pickle.UnpicklingError, EOFError):
        raise ValueError("it is no PyTorch file of tensors alone") from None
    with explain_missing_extra("Inception"):
        from .inception import InceptionNetwork
    try:
        return InceptionNetwork(weights)
    except RuntimeError:  # its message lists hundreds of tensors
        raise ValueError("its tensors are not those of torch-fidelity's Inception") from None
