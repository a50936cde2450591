"""What every model family answers: how it loads, encodes prompts and pixels, predicts at a noise level."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from scalewise.method.noise import NoiseProcess
from scalewise.method.scales import Scale, ScaleSchedule

Part = Literal["denoiser", "vae", "text"]
ALL_PARTS: tuple[Part, ...] = ("denoiser", "vae", "text")


@dataclass(frozen=True)
class Condition:
    """What a denoiser is told beside x_t and t: opaque tensors, each with the batch as first dimension."""

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


class ModelError(ValueError):
    """A model that cannot be loaded or used as asked."""


class ModelAdapter(ABC):
    """One diffusers family behind one interface; velocity, packing, position ids and the like end here.

    Latents are [N, C, H, W] (video [N, C, T, H, W]), normalised as the denoiser wants them.
    """

    family: ClassVar[str]
    pipeline_classes: ClassVar[tuple[str, ...]]
    denoiser_name: ClassVar[str] = "transformer"
    """Name of the denoiser in the pipeline."""
    lora_targets: ClassVar[tuple[str, ...]]
    video: ClassVar[bool] = False

    noise: NoiseProcess
    base: str
    denoiser: nn.Module
    patch: int
    """Latent cells along each side of a token."""
    channels: int
    """Channels C of a latent."""
    vae_factor: int
    """Pixels along each side of a latent cell."""
    embedded_guidance: float = 1.0
    """What a model that takes guidance as an input is told where nothing else is asked for: the student's."""
    frame_factor: int = 1
    """Frames of video that a latent frame stands for (the first one for a single frame)."""
    blocks: int
    """Number of blocks that can be tapped."""
    width: int
    """Width D of a block's tokens."""
    full_scale: Scale
    """The latent size that the model was made for."""
    largest_scale: Scale | None
    """The largest latent that the model has positions for; None = no limit."""

    @classmethod
    @abstractmethod
    def load(
        cls,
        base: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        parts: Sequence[Part] = ALL_PARTS,
        max_sequence_length: int | None = None,
        vae: str | Path | None = None,
        variant: str | None = None,
    ) -> ModelAdapter:
        """Load the parts asked for from a folder in diffusers' layout or the hub; safetensors only.

        `vae` is another autoencoder of the same latents, such as a tiny one (AutoencoderTiny). `variant`
        chooses weights such as model.fp16.safetensors; None = the plain ones, or those that are there.
        """

    @classmethod
    @abstractmethod
    def tiny(cls, seed: int = 0) -> ModelAdapter:
        """Return a random miniature made of the family's real classes, tokenizers included."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write all components in the hub's folder layout."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Embed prompts; warns about those longer than a text encoder reads."""

    @abstractmethod
    def warned_once(
        self, prompts: Sequence[str], *, tokens: int | None = None
    ) -> AbstractContextManager[None]:
        """Warn in one sentence of all `prompts` that a text encoder cuts; encoding within it warns no more.

        `tokens`: T5 tokens that count, where they are not those of `encode_prompts`.
        """

    @abstractmethod
    def longest_sequence(self) -> int:
        """Tokens that the long text encoder reads in training unless told otherwise."""

    @abstractmethod
    def stock_sequence(self) -> int:
        """Tokens that it reads in the family's own pipeline."""

    @abstractmethod
    def encode_for_teacher(self, prompts: Sequence[str], length: int | None = None) -> Condition:
        """Embed prompts for the teacher's sampling, with `length` T5 tokens; None = as many as the family's
        own pipeline reads.
        """

    @abstractmethod
    def empty_condition(self, count: int, device: torch.device | str) -> Condition:
        """Uninitialised tensors in the shapes of `count` encoded prompts, from the configuration alone."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels [N, 3, H, W] (video [N, 3, F, H, W]) in [-1, 1] into normalised latents (the
        posterior's mode).
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents into pixels [N, 3, H, W] (video [N, 3, F, H, W]) in [-1, 1]."""

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The network's raw prediction at noise levels t [N] in [0, 1000], in latent layout."""

    @abstractmethod
    def block(self, index: int) -> nn.Module:
        """The transformer block whose features are tapped."""

    @abstractmethod
    def image_tokens(self, output: Any) -> Tensor:
        """Pick the image stream [N, L, D] out of a block's output."""

    @abstractmethod
    def teacher_scheduler(self, steps: int, scale: Scale, *, shift: float | None = None) -> Any:
        """The model's own scheduler (diffusers), set to `steps` steps of a sample of a size.

        `shift` takes the place of the schedule's own; ModelError for a scheduler without one.
        """

    def with_guidance(self, cond: Condition, guidance: float) -> Condition | None:
        """The condition that carries `guidance` as an input of the network; None where guidance means two
        forwards.
        """
        return None

    @abstractmethod
    def release(self, *parts: Part) -> None:
        """Drop parts that are not needed any more, to free their memory."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model is."""

    @abstractmethod
    def to(self, device: torch.device | str) -> ModelAdapter:
        """Move every loaded part."""

    def token_count(self, scale: Scale) -> int:
        """Image tokens of one sample at a scale."""
        return scale.cells // self.patch**2

    def check_schedule(self, schedule: ScaleSchedule) -> None:
        """Refuse a schedule of another kind of model, or with scales that this one cannot take."""
        if any(scale.frames > 1 for scale in schedule.scales) and not self.video:
            raise ModelError(
                f"The schedule {schedule} is of another family: this is a model for images. Give scales of "
                "height and width alone."
            )
        if self.video and all(scale.frames == 1 for scale in schedule.scales) and self.full_scale.frames > 1:
            raise ModelError(
                f"The schedule {schedule} is of another family: this is a model for videos. Give scales with "
                "frames, as in 21x60x104."
            )
        schedule.check(patch=self.patch, largest=self.largest_scale)

    def pixel_size(self, scale: Scale) -> tuple[int, ...]:
        """Height and width in pixels of a sample of a latent size; for video frames, height and width."""
        size = (scale.height * self.vae_factor, scale.width * self.vae_factor)
        return ((scale.frames - 1) * self.frame_factor + 1, *size) if self.video else size

    @abstractmethod
    def compile_blocks(self, **options: Any) -> None:
        """Compile every repeated block of the denoiser; `options` go to torch.compile."""

    def enable_checkpointing(self, function: Any) -> None:
        """Switch gradient checkpointing on, with the given function around every block."""
        self.denoiser.enable_gradient_checkpointing(function)  # type: ignore[operator]
