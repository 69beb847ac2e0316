"""`InceptionNetwork`, on whose features papers take Fréchet and kernel distances, from weights that the user has."""

from __future__ import annotations

import os

import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


class InceptionNetwork(FeatureExtractorInceptionV3):
    r"""
    torch-fidelity's Inception v3, called as [`FeatureNetwork`] is. Images of any size are brought to 299 × 299.

    Parameters:
        weights (`str` or `os.PathLike[str]`):
            torch-fidelity's file of weights, of which [`load_features`] has seen that it is safe to load.
    """

    channels = (1, 3)  # that it takes
    num_features = 2048

    def __init__(self, weights: str | os.PathLike[str]):
        super().__init__("inception-v3-compat", ["2048"], os.fspath(weights))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        r"""The features, `[batch, 2048]`, of images, uint8 `[batch, 1 or 3, height, width]`."""
        return super().forward(images.expand(-1, 3, -1, -1))[0]
