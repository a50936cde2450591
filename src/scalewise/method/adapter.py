"""What the method asks of a model, and the conditioning that it passes to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scalewise.method.noise import NoiseProcess
from scalewise.method.scales import Scale

GUIDANCE = "guidance"
"""Name of the guidance [N] in a condition that carries it."""


@dataclass(frozen=True)
class Condition:
    """Conditioning passed to the denoiser: opaque tensors, each with the batch as first dimension."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Condition:
        chosen: Any = slice(index, index + 1) if isinstance(index, int) else index
        return Condition({k: v[chosen] for k, v in self.tensors.items()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """Move, and cast what is floating point."""
        return Condition(
            {
                k: v.to(device=device, dtype=dtype if v.is_floating_point() else None)
                for k, v in self.tensors.items()
            }
        )

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Join conditions along the batch."""
        return Condition({k: torch.cat([p.tensors[k] for p in parts]) for k in parts[0].tensors})

    def expand(self, count: int) -> Condition:
        """Repeat a condition of length 1 to `count` samples."""
        return Condition({k: v.expand(count, *v.shape[1:]) for k, v in self.tensors.items()})

    def with_guidance(self, guidance: float) -> Condition:
        """Carry `guidance` as an input of the network, for a model that takes it so."""
        device = next(iter(self.tensors.values())).device
        return Condition({**self.tensors, GUIDANCE: torch.full((len(self),), guidance, device=device)})


class ModelAdapter(ABC):
    """A model as the method sees it; velocity, packing, position ids and the like end behind it.

    Latents are [N, C, H, W] (video [N, C, T, H, W]), normalized as the denoiser wants them.
    """

    denoiser_name: ClassVar[str] = "transformer"
    """Name of the denoiser in the pipeline."""
    lora_targets: ClassVar[tuple[str, ...]]
    video: ClassVar[bool] = False

    noise: NoiseProcess
    patch: int
    """Latent cells along each side of a token."""
    channels: int
    """Channels C of a latent."""
    blocks: int
    """Number of blocks that can be tapped."""
    width: int
    """Width D of a block's tokens."""
    embedded_guidance: float | None = None
    """Guidance that the network takes as an input where a condition carries none: the student's. None for a
    network without that input, with which guidance means two forwards."""

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The network."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model runs."""

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return the network's raw prediction at noise levels t [N] in [0, 1000], in latent layout."""

    @abstractmethod
    def block(self, index: int) -> nn.Module:
        """Return the transformer block whose features are tapped."""

    @abstractmethod
    def image_tokens(self, output: Any) -> Tensor:
        """Pick the image stream [N, L, D] out of a block's output."""

    @abstractmethod
    def teacher_scheduler(self, steps: int, scale: Scale, *, shift: float | None = None) -> Any:
        """Return the model's own scheduler (diffusers), set to `steps` steps of a sample of a size.

        `shift` takes the place of the schedule's own.
        """

    @abstractmethod
    def enable_checkpointing(self, function: Any) -> None:
        """Switch gradient checkpointing on, with the given function around every block."""

    def token_count(self, scale: Scale) -> int:
        """Count the image tokens L of one sample at a scale."""
        return scale.cells // self.patch**2
