"""Pictures of samples, with numpy and Pillow only."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

SIZE = 800  # pixels
INK = (255, 127, 14)


def draw_points(points: npt.NDArray[np.floating]) -> Image.Image:
    """A scatter plot of the first two coordinates, in one scale.

    Args:
        points: `[number of points, at least 2]`.
    """
    size = 2 * SIZE  # drawn at twice the size, then halved, for smooth dots
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


def to_pixels(images: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """Numbers in [0, 1] as uint8."""
    pixels: npt.NDArray[np.uint8] = np.rint(images * 255).astype(np.uint8)
    return pixels


def to_picture(image: npt.NDArray[np.floating]) -> Image.Image:
    """An image `[height, width, 1 or 3]` in [0, 1] as a picture."""
    pixels = to_pixels(image)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def image_grid(
    batches: Iterable[npt.NDArray[np.floating]], number: int, gap: int = 0, background: str = "black"
) -> Image.Image:
    """Images side by side, in a grid about as wide as high.

    Args:
        batches: in [0, 1], each `[batch, height, width, 1 or 3]`.
        number: of images in all of them.
        gap: pixels between two of them.
        background: the colour of gaps, and of places without an image.
    """
    columns = math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    grid, i = None, 0
    for batch in batches:
        for image in batch:
            picture = to_picture(image)
            width, height = picture.width + gap, picture.height + gap
            if grid is None:
                grid = Image.new(picture.mode, (columns * width - gap, rows * height - gap), background)
            grid.paste(picture, (i % columns * width, i // columns * height))
            i += 1
    if grid is None:
        raise ValueError("there are no images to show")
    return grid
