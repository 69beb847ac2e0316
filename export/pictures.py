"""Pictures of samples, with numpy and Pillow only."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

SIZE = 800  # pixels
INK = (255, 127, 14)


def draw_points(points: np.ndarray) -> Image.Image:
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


def image_grid(images: np.ndarray) -> Image.Image:
    """Images side by side, in a grid about as wide as high.

    Args:
        images: in [0, 1], `[number of images, height, width, 1 or 3]`.
    """
    number, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    grid = np.zeros((rows * columns, height, width, channels), dtype=np.uint8)
    grid[:number] = np.rint(images * 255)
    grid = grid.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    grid = grid.reshape(rows * height, columns * width, channels)
    return Image.fromarray(grid[..., 0] if channels == 1 else grid)
