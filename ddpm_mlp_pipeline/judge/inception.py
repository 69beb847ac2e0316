"""Inception v3 from the user's weights, for Fréchet and kernel distances as in papers (FID and KID)."""

from __future__ import annotations

import os

import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


class InceptionNetwork(FeatureExtractorInceptionV3):
    r"""
    torch-fidelity's Inception v3, with the interface of [`FeatureNetwork`]. It resizes images to 299 × 299.

    Parameters:
        weights (`str` or `os.PathLike[str]`):
            torch-fidelity's file of weights. Loading it can run code: [`load_features`] checks it first.
    """

    channels = (1, 3)
    num_features = 2048

    def __init__(self, weights: str | os.PathLike[str]):
        super().__init__("inception-v3-compat", ["2048"], os.fspath(weights))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        r"""Compute the features, `[batch, 2048]`, of images, uint8 `[batch, 1 or 3, height, width]`."""
        return super().forward(images.expand(-1, 3, -1, -1))[0]
