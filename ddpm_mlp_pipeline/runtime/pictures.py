"""Draw samples as pictures, with numpy and Pillow only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

SIZE = 800  # pixels
INK = (255, 127, 14)


def draw_points(points: npt.NDArray[np.floating]) -> Image.Image:
    """Return a scatter plot of the first two coordinates, with the same scale on both axes.

    Args:
        points: `[number of points, dimension]`, of dimension at least 2.
    """
    size = 2 * SIZE  # halved at the end, for smooth dots
    xy = points[:, :2].astype(np.float64)
    low, high = np.percentile(xy, [0.1, 99.9], axis=0)
    span = max((high - low).max() * 1.15, 1e-12)
    pixels = ((xy - (low + high) / 2) / span * (1, -1) + 0.5) * size  # a picture's y points down
    radius = 5 if len(pixels) <= 5000 else 3

    dots = Image.new("L", (size, size))
    draw = ImageDraw.Draw(dots)
    for x, y in pixels.tolist():
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    dots = dots.resize((SIZE, SIZE), Image.Resampling.BOX)
    return Image.composite(Image.new("RGB", dots.size, INK), Image.new("RGB", dots.size, "white"), dots)


def to_pixels(images: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Convert numbers in [0, 1] to uint8; return those of uint8 as they are."""
    pixels: npt.NDArray[np.uint8] = images if images.dtype == np.uint8 else np.rint(images * 255).astype(np.uint8)
    return pixels


def to_picture(image: npt.NDArray[Any]) -> Image.Image:
    """Convert an image in [0, 1] or of uint8, `[height, width, 1 or 3]`, to a picture."""
    pixels = to_pixels(image)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def image_grid(
    batches: Iterable[npt.NDArray[Any]], number: int, gap: int = 0, background: str = "black"
) -> Image.Image:
    """Return images in a roughly square grid.

    Args:
        batches: arrays in [0, 1] or of uint8, each `[batch, height, width, 1 or 3]`.
        number: number of images in all batches together.
        gap: pixels between two images.
        background: colour of gaps and empty places.

    Raises:
        ValueError: if there are no images.
    """
    columns = math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    grid = None
    for i, image in enumerate(itertools.chain.from_iterable(batches)):
        picture = to_picture(image)
        width, height = picture.width + gap, picture.height + gap
        if grid is None:
            grid = Image.new(picture.mode, (columns * width - gap, rows * height - gap), background)
        grid.paste(picture, (i % columns * width, i // columns * height))
    if grid is None:
        raise ValueError("there are no images to show")
    return grid
