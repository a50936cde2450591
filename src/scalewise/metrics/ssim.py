"""Structural similarity of an image with a known drawing (Wang et al. 2004)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

WINDOW = 7
"""Side in pixels of the windows of SSIM."""


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity [N] of images a and b [N, C, H, W] in [-1, 1].

    With uniform windows of 7 x 7 pixels, on the mean of the color channels in [0, 1], because the luminance
    term needs means that are not negative.
    """
    a, b = ((x.mean(1, keepdim=True) + 1) / 2 for x in (a, b))
    mean_a, mean_b = F.avg_pool2d(a, WINDOW, 1), F.avg_pool2d(b, WINDOW, 1)
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    variance_a = unbiased * (F.avg_pool2d(a * a, WINDOW, 1) - mean_a**2)
    variance_b = unbiased * (F.avg_pool2d(b * b, WINDOW, 1) - mean_b**2)
    covariance = unbiased * (F.avg_pool2d(a * b, WINDOW, 1) - mean_a * mean_b)
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).mean((1, 2, 3))


def clip_box(
    box: tuple[float, float, float, float], side: int, *, margin: int
) -> tuple[int, int, int, int] | None:
    """Return a box (left, top, right, bottom) without the part closer than `margin` to the image's border.

    None if what is left is too small for SSIM. The image is `side` pixels wide and high.
    """
    left, top = (max(round(edge), margin) for edge in box[:2])
    right, bottom = (min(round(edge), side - margin) for edge in box[2:])
    return (left, top, right, bottom) if min(right - left, bottom - top) > WINDOW else None


def shifted_ssim(image: Tensor, drawing: Tensor, corner: tuple[int, int], *, shift: int) -> float:
    """Return the SSIM of a drawing [C, h, w] with an image [C, H, W], both in [-1, 1].

    The left top corner of the drawing is at `corner` (x, y) in the image, shifted by up to `shift` pixels
    along each axis to the least squared error; the image must have that margin.
    """
    (left, top), (height, width) = corner, drawing.shape[-2:]
    around = image[:, top - shift : top + height + shift, left - shift : left + width + shift]
    # Windows of the size of the drawing, as a view: [2 shift + 1, 2 shift + 1, h, w].
    windows = around.mean(0).unfold(0, height, 1).unfold(1, width, 1)
    errors = (windows - drawing.mean(0)).square().mean((2, 3))
    row, column = divmod(int(errors.argmin()), errors.shape[1])
    return float(ssim(windows[row, column][None, None], drawing[None]))
