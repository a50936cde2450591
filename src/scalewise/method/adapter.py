"""The interface of a model, and the conditioning passed to it."""

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
"""Name of the tensor with the guidance [N] in a condition; see `Condition.with_guidance`."""


@dataclass(frozen=True)
class Condition:
    """Conditioning passed to the denoiser: tensors [N, ...] by name, which only the adapter interprets."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Condition:
        selection: Any = slice(index, index + 1) if isinstance(index, int) else index
        return Condition({k: v[selection] for k, v in self.tensors.items()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """Move all tensors to a device, and cast floating-point tensors to a dtype."""
        return Condition(
            {
                k: v.to(device=device, dtype=dtype if v.is_floating_point() else None)
                for k, v in self.tensors.items()
            }
        )

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Concatenate conditions along the batch."""
        return Condition({k: torch.cat([p.tensors[k] for p in parts]) for k in parts[0].tensors})

    def expand(self, count: int) -> Condition:
        """Expand a condition of length 1 to `count` samples."""
        return Condition({k: v.expand(count, *v.shape[1:]) for k, v in self.tensors.items()})

    def with_guidance(self, guidance: float) -> Condition:
        """Return this condition with a value of guidance for models that take guidance as an input."""
        device = next(iter(self.tensors.values())).device
        return Condition({**self.tensors, GUIDANCE: torch.full((len(self),), guidance, device=device)})


class ModelAdapter(ABC):
    """Interface of a model; packing, position ids and other details of a model family are hidden behind it.

    Latents are [N, C, H, W] (video [N, C, T, H, W]), normalized as the denoiser expects them.
    """

    denoiser_name: ClassVar[str] = "transformer"
    """Name of the denoiser in the diffusers pipeline."""
    lora_targets: ClassVar[tuple[str, ...]]
    """Suffixes of the names of the linear layers that get LoRA by default."""
    video: ClassVar[bool] = False

    noise: NoiseProcess
    patch: int
    """Side length of a token in latent cells."""
    channels: int
    """Number of latent channels C."""
    blocks: int
    """Number of blocks whose features can be extracted."""
    width: int
    """Width D of the tokens of a block."""
    embedded_guidance: float | None = None
    """Guidance input of the network for conditions without their own value. None = the network has no such
    input, and guidance needs two forward passes."""

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The denoising network."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device on which the model runs."""

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return the raw prediction [N, C, H, W] for x_t [N, C, H, W] at timesteps t [N] in [0, 1000]."""

    @abstractmethod
    def block(self, index: int) -> nn.Module:
        """Return a block by index."""

    @abstractmethod
    def image_tokens(self, output: Any) -> Tensor:
        """Return the image tokens [N, L, D] from the output of a block."""

    @abstractmethod
    def teacher_scheduler(self, steps: int, scale: Scale, *, shift: float | None = None) -> Any:
        """Return the diffusers scheduler of the model with the timesteps for `steps` steps at a scale.

        `shift` replaces the timestep shift of the scheduler.
        """

    @abstractmethod
    def enable_checkpointing(self, function: Any) -> None:
        """Enable gradient checkpointing, with `function` as the checkpointing function of every block."""

    def token_count(self, scale: Scale) -> int:
        """Count the image tokens L of one sample at a scale."""
        return scale.cells // self.patch**2
