"""The network of the mini's detectors: heat maps over cells of 4 pixels (CenterNet, arXiv 1904.07850)."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 4
"""Side of a cell in pixels."""


class Block(nn.Module):
    """Two 3 x 3 convolutions with a residual connection, on features [N, C, H, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.body(x)
        return y


class CenterNet(nn.Module):
    """Predicts outputs for every cell of an image, and outputs for the whole image.

    Images [N, 3, H, W] are reduced to cells of 4, 8 and 16 pixels; coarser features are added to finer ones.
    """

    def __init__(
        self, widths: tuple[int, int, int], *, joined: int, outputs: tuple[int, ...], image: int, stem: int
    ) -> None:
        """Build the network.

        `widths`: of the features at 4, 8 and 16 pixels; `joined`: of their sum; `outputs`: number of outputs
        of each kind by cell, the first of which are heat maps; `image`: number of outputs of the whole image;
        `stem`: blocks at 4 pixels.
        """
        super().__init__()
        fine, middle, low = widths
        self.outputs = outputs
        self.stem = nn.Sequential(
            nn.Conv2d(3, fine, 8, stride=STRIDE, padding=2), *(Block(fine) for _ in range(stem))
        )
        self.down = nn.Sequential(
            nn.Conv2d(fine, middle, 4, stride=2, padding=1), Block(middle), Block(middle)
        )
        self.low = nn.Sequential(nn.Conv2d(middle, low, 4, stride=2, padding=1), Block(low), Block(low))
        self.up_1, self.up_2 = nn.Conv2d(low, middle, 1), nn.Conv2d(middle, joined, 1)
        self.skip, self.last = nn.Conv2d(fine, joined, 1), Block(joined)
        self.cells = nn.Conv2d(joined, sum(outputs), 1)
        assert self.cells.bias is not None
        nn.init.zeros_(self.cells.bias)
        nn.init.constant_(self.cells.bias[: outputs[0]], -4.0)  # hardly any cell is the center of a thing
        self.image = nn.Linear(low, image)

    def outputs_of(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Return outputs by cell, one [N, K, H / 4, W / 4] of each kind; those of the image [N, M]; and its
        features [N, D], for images [N, 3, H, W] in [-1, 1].
        """
        fine = self.stem(x)
        middle = self.down(fine)
        low = self.low(middle)
        joined = middle + F.interpolate(self.up_1(low), scale_factor=2.0)
        joined = self.skip(fine) + F.interpolate(self.up_2(joined), scale_factor=2.0)
        features = low.mean((2, 3))
        return self.cells(self.last(joined)).split(self.outputs, dim=1), self.image(features), features


def find_peaks(heat: Tensor, *, threshold: float, radius: int) -> Iterator[tuple[int, int, int, int, float]]:
    """Yield (image, row, column, class, score) of the peaks of heat maps, logits [N, K, H, W].

    A peak is the highest score of all classes within `radius` cells, and above the threshold.
    """
    scores, classes = heat.sigmoid().max(1)
    window = 2 * radius + 1
    nearby = F.max_pool2d(scores[:, None], window, stride=1, padding=radius)[:, 0]
    for n, row, column in ((scores == nearby) & (scores > threshold)).nonzero().tolist():
        yield n, row, column, int(classes[n, row, column]), float(scores[n, row, column])
