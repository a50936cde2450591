"""What all families share: a diffusers pipeline whose parts are loaded, frozen, moved and dropped."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from torch import Tensor, nn

from scalewise.common.errors import ModelError
from scalewise.method.adapter import Condition, ModelAdapter
from scalewise.method.scales import Scale, ScaleSchedule
from scalewise.models.folder import ALL_PARTS, Part, check_index, model_index
from scalewise.models.intact import check_folder
from scalewise.models.loading import load_pipeline, spatial_factor
from scalewise.models.long_prompts import overlong
from scalewise.models.schedulers import dynamic_shift, set_for_sampling

READS = 512
"""Tokens that T5 reads at most, as SwD and diffusers' own pipelines have it."""


class PipelineAdapter(ModelAdapter):
    """An adapter around the family's own diffusers pipeline, of which any part may be missing."""

    family: ClassVar[str]
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    lora_targets: ClassVar[tuple[str, ...]] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "net.0.proj",
        "net.2",
    )  # as released
    text_names: ClassVar[tuple[str, ...]]
    t5_tokenizer: ClassVar[str | None]
    """Name of the tokenizer of T5; None for a family without it."""
    optional_texts: ClassVar[tuple[str, ...]] = ()
    """The text encoder that a base may do without, and its tokenizer."""

    frame_factor: int = 1
    """Frames of video that a latent frame stands for (the first one for a single frame)."""
    full_scale: Scale
    """The latent size that the model was made for."""
    largest_scale: Scale | None = None
    """The largest latent that the model has positions for; None = no limit."""

    def __init__(
        self,
        pipeline: Any,
        config: Mapping[str, Any],
        vae_config: Mapping[str, Any],
        *,
        base: str,
        max_sequence_length: int | None = None,
    ) -> None:
        """`config` is the denoiser's, `vae_config` the VAE's: sizes are known while neither is loaded.

        The weights stay as they are, for the pipeline may be the user's: `load` and `tiny` freeze theirs.
        """
        self.pipeline, self.base, self.config = pipeline, base, config
        self._resting: list[nn.Module] = []
        self.runs_on: torch.device | None = None  # set where offloaded weights lie elsewhere than they run
        self.warned = False  # of the prompts that are being encoded
        self.vae_config = vae_config
        self.vae_factor = spatial_factor(vae_config)
        """Pixels along each side of a latent cell."""
        self.describe(config)
        self.max_sequence_length = max_sequence_length or self.longest_sequence()

    def freeze(self) -> Self:
        """Switch off gradients and training mode of every loaded part."""
        for component in self._modules():
            component.requires_grad_(False)
            component.eval()
        return self

    @classmethod
    def around(cls, pipeline: Any, *, base: str, max_sequence_length: int | None = None) -> Self:
        """Wrap a pipeline that has its denoiser and VAE; its weights stay as they are."""
        denoiser = getattr(pipeline, cls.denoiser_name)
        return cls(
            pipeline, denoiser.config, pipeline.vae.config, base=base, max_sequence_length=max_sequence_length
        )

    @classmethod
    @abstractmethod
    def tiny(cls, seed: int = 0) -> Self:
        """Make a random miniature of the family's real classes, tokenizers included."""

    @abstractmethod
    def describe(self, config: Mapping[str, Any]) -> None:
        """Set noise, patch, channels, blocks, width and full_scale from the denoiser's configuration."""

    def set_guidance(self, guidance: float) -> None:
        """Set the guidance that the network takes as an input; warn for a model without that input."""
        if self.embedded_guidance is None:
            warnings.warn(
                f"model.embedded_guidance={guidance:g} has no effect: {self.base} does not take guidance as "
                "an input. Set it to null.",
                stacklevel=3,
            )
        else:
            self.embedded_guidance = guidance

    def longest_sequence(self) -> int:
        """Count the tokens that the long text encoder reads in training unless told otherwise."""
        tokenizer = getattr(self.pipeline, self.t5_tokenizer or "tokenizer")
        return READS if tokenizer is None else min(READS, tokenizer.model_max_length)

    def stock_sequence(self) -> int:
        """Count the tokens that it reads in the family's own pipeline, as for the teacher's samples."""
        return self.longest_sequence()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Embed prompts; warns about those longer than a text encoder reads."""
        self._need("text_encoder", "text")
        self.warn_of_overflow(prompts)
        with self.text_at_work() as device:
            return Condition(self.embed(list(prompts), device))

    @abstractmethod
    def embed(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """Run the text encoders, which are on `device`: embeddings by their names in a condition."""

    def encode_for_teacher(self, prompts: Sequence[str], length: int | None = None) -> Condition:
        """Embed prompts for the teacher's sampling, with `length` T5 tokens; None = as many as the family's
        own pipeline reads.
        """
        if length is not None and self.t5_tokenizer is None:
            raise ModelError(
                f"teacher.max_sequence_length={length} has no effect: {self.base} has no T5. Set it to null."
            )
        before, self.max_sequence_length = self.max_sequence_length, length or self.stock_sequence()
        try:
            return self.encode_prompts(prompts)
        finally:
            self.max_sequence_length = before

    @abstractmethod
    def tokenizers(self) -> list[tuple[Any, int, str]]:
        """Tokenizer, number of tokens read and name of every text encoder: longer prompts are cut."""

    @abstractmethod
    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one prompt's embeddings, by their names in a condition."""

    def empty_condition(self, count: int, device: torch.device | str) -> Condition:
        """Return uninitialized tensors in the shapes of `count` encoded prompts."""
        shapes = self.prompt_shapes().items()
        return Condition({name: torch.empty(count, *shape, device=device) for name, shape in shapes})

    @classmethod
    def parts(cls) -> dict[Part, tuple[str, ...]]:
        """Names of the pipeline's components by part."""
        return {"denoiser": (cls.denoiser_name,), "vae": ("vae",), "text": cls.text_names}

    @classmethod
    def components(cls, base: str | Path) -> dict[str, tuple[str, str]]:
        """Library and class of a base's components; ModelError if one that is needed is missing."""
        required = (cls.denoiser_name, "vae", "scheduler", *cls.text_names)
        found = check_index(model_index(base), base, required=required, optional=cls.optional_texts)
        if cls.optional_texts and cls.optional_texts[0] not in found:  # a tokenizer alone is of no use
            return {name: entry for name, entry in found.items() if name not in cls.optional_texts}
        return check_index(model_index(base), base, required=required)

    @classmethod
    def check_files(
        cls, base: str | Path, found: Mapping[str, tuple[str, str]], parts: Sequence[Part], *,
        variants: Mapping[str, str | None], other_vae: bool = False, planned: bool = False,
    ) -> None:  # fmt: skip
        """Refuse a folder with missing or damaged files of `parts`; one that is only `planned` needs no
        weights.
        """
        names = [cls.denoiser_name, "vae", "scheduler", *(cls.text_names if "text" in parts else ())]
        weights = [n for part in parts for n in cls.parts()[part] if not (n == "vae" and other_vae)]
        check_folder(base, found, names=names, weights=() if planned else weights, variants=variants)

    @classmethod
    def usual_sequence(cls, components: Mapping[str, tuple[str, str]]) -> int | None:
        """Tokens of the long text encoder in a base that has these components; None = `longest_sequence`."""
        return None

    @classmethod
    def vae_dtype(cls, vae_config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
        """Type of the VAE in a model of `dtype`; some VAEs overflow or lose too much in half precision."""
        return dtype

    @classmethod
    def load(
        cls,
        base: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        parts: Sequence[Part] = ALL_PARTS,
        max_sequence_length: int | None = None,
        vae: str | Path | None = None,
        variant: str | None = None,
    ) -> Self:
        """Load the parts asked for from a folder in diffusers' layout or the hub, frozen; safetensors only.

        `vae` is another autoencoder of the same latents, such as a tiny one (AutoencoderTiny). `variant`
        chooses weights such as model.fp16.safetensors; None = the plain ones, or those that are there.
        """
        pipeline, config, vae_config, found = load_pipeline(
            cls, str(base), dtype=dtype, parts=parts, vae=str(vae) if vae else None, variant=variant
        )
        longest = max_sequence_length or cls.usual_sequence(found)
        return cls(pipeline, config, vae_config, base=str(base), max_sequence_length=longest).freeze()

    def save(self, folder: Path) -> None:
        """Write all components in the hub's folder layout."""
        self.pipeline.save_pretrained(folder, safe_serialization=True)

    @property
    def denoiser(self) -> nn.Module:
        """The network; asserts that it was loaded."""
        return self._need(self.denoiser_name, "denoiser")

    @property
    def device(self) -> torch.device:
        """Where the parts run, also those whose weights lie elsewhere."""
        if self.runs_on is not None:
            return self.runs_on
        # Offloaded components lie elsewhere than they run; diffusers knows where that is.
        hooks = ("_hf_hook", "_diffusers_hook")
        if any(hasattr(m, hook) for c in self._modules() for m in (c, *c.children()) for hook in hooks):
            return torch.device(self.pipeline._execution_device)
        working = [c for c in self._modules() if c not in self._resting]
        if not working:
            return self._encodes_on
        return next(p.device for c in working for p in c.parameters())

    def to(self, device: torch.device | str) -> Self:
        """Move every loaded part, but for text encoders that are kept in main memory."""
        for component in self._modules():
            if component not in self._resting:
                component.to(device)
        return self

    def offload_text(self, device: torch.device | str) -> None:
        """Keep the text encoders in main memory; each is on `device` only while prompts are encoded."""
        self._resting = [
            c for name in self.text_names if isinstance(c := getattr(self.pipeline, name, None), nn.Module)
        ]
        self._encodes_on = torch.device(device)

    @contextmanager
    def text_at_work(self) -> Iterator[torch.device]:
        """Within it the text encoders are where they encode, which is given; offloaded ones go back then."""
        if not self._resting:
            yield self.device
            return
        for encoder in self._resting:
            encoder.to(self._encodes_on)
        try:
            yield self._encodes_on
        finally:
            for encoder in self._resting:
                encoder.to("cpu")

    def release(self, *parts: Part) -> None:
        """Drop parts that are not needed any more, to free their memory."""
        for part in parts:
            for name in self.parts()[part]:
                setattr(self.pipeline, name, None)

    def warn_of_overflow(self, prompts: Sequence[str]) -> None:
        """Warn, once for all, of prompts whose end a text encoder will not read; not within `warned_once`."""
        if not self.warned and (told := overlong(prompts, self.tokenizers())):
            warnings.warn(told, stacklevel=4)

    @contextmanager
    def warned_once(self, prompts: Sequence[str], *, tokens: int | None = None) -> Iterator[None]:
        """Warn in one sentence of all `prompts` that a text encoder cuts; encoding within it warns no more.

        `tokens`: T5 tokens that count, where they are not those of `encode_prompts`.
        """
        before, length = self.warned, self.max_sequence_length
        self.max_sequence_length = tokens or length
        self.warn_of_overflow(prompts)
        self.max_sequence_length, self.warned = length, True
        try:
            yield
        finally:
            self.warned = before

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels [N, 3, H, W] (video [N, 3, F, H, W]) in [-1, 1] into normalized latents (the
        posterior's mode).
        """
        vae: Any = self._need("vae", "vae")
        found = vae.encode(pixels.to(self.device, vae.dtype))
        # The mode and not a draw: the cached latent of an image is the same whenever it is made. A tiny
        # autoencoder has no distribution.
        latents = found.latents if isinstance(vae, AutoencoderTiny) else found.latent_dist.mode()
        return self.normalise(latents.float())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalized latents into pixels [N, 3, H, W] (video [N, 3, F, H, W]) in [-1, 1]."""
        vae: Any = self._need("vae", "vae")
        latents = self.denormalise(latents.float())
        return vae.decode(latents.to(self.device, vae.dtype)).sample.float().clamp(-1, 1)

    def normalise(self, latents: Tensor) -> Tensor:
        """Bring the VAE's latents to what the denoiser wants: (z - shift) * factor."""
        config = self._need("vae", "vae").config
        return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def denormalise(self, latents: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        config = self._need("vae", "vae").config
        return latents / config.scaling_factor + (config.get("shift_factor") or 0.0)

    def pixel_size(self, scale: Scale) -> tuple[int, ...]:
        """Height and width in pixels of a sample of a latent size; for video frames, height and width."""
        size = (scale.height * self.vae_factor, scale.width * self.vae_factor)
        return ((scale.frames - 1) * self.frame_factor + 1, *size) if self.video else size

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

    def block(self, index: int) -> nn.Module:
        """Return a block by number; ModelError for one that is not there."""
        if not 0 <= index < self.blocks:
            raise ModelError(f"There is no block {index}; this model has blocks 0 to {self.blocks - 1}.")
        return self.block_list()[index]

    @abstractmethod
    def block_list(self) -> Sequence[nn.Module]:
        """All blocks that can be tapped, in the order in which they run."""

    def repeated_blocks(self) -> list[nn.Module]:
        """The modules that the network consists of many of."""
        return list(self.block_list())

    def compile_blocks(self, **options: Any) -> None:
        """Compile every repeated block of the denoiser; `options` go to torch.compile."""
        # torch gives up after 8 versions of a function, and runs it uncompiled with no more than a log line.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for block in self.repeated_blocks():
            block.compile(**options)

    def enable_checkpointing(self, function: Any) -> None:
        self.denoiser.enable_gradient_checkpointing(function)  # type: ignore[operator]

    def teacher_scheduler(self, steps: int, scale: Scale, *, shift: float | None = None) -> Any:
        """Return the base's own scheduler, set for a sample of a size; ModelError if it cannot be used."""
        return set_for_sampling(
            self.pipeline.scheduler, steps, self.noise, base=self.base, shift=shift,
            options=lambda scheduler: self.scheduler_options(scheduler, steps, scale),
        )  # fmt: skip

    def scheduler_options(self, scheduler: Any, steps: int, scale: Scale) -> dict[str, Any]:
        """What the pipeline passes to `set_timesteps` besides the number of steps."""
        if scheduler.config.get("use_dynamic_shifting"):
            return {"mu": dynamic_shift(scheduler.config, self.token_count(scale))}
        return {}

    def _need(self, name: str, part: Part) -> Any:
        component = getattr(self.pipeline, name, None)
        assert component is not None, f"the {part} of {self.base} was not loaded"
        return component

    def _modules(self) -> list[nn.Module]:
        return [c for c in self.pipeline.components.values() if isinstance(c, nn.Module)]
