"""The base class of all model families: an adapter around a diffusers pipeline."""

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
from scalewise.models.long_prompts import describe_truncation
from scalewise.models.schedulers import dynamic_shift, prepare_scheduler

MAX_T5_TOKENS = 512
"""Maximum number of T5 tokens, as in SwD and in the pipelines of diffusers."""


class PipelineAdapter(ModelAdapter):
    """Adapter around the diffusers pipeline of a model family; parts that are not needed are not loaded."""

    family: ClassVar[str]
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    lora_targets: ClassVar[tuple[str, ...]] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "net.0.proj",
        "net.2",
    )  # as in the released code of SwD
    text_names: ClassVar[tuple[str, ...]]
    """Names of the text encoders and tokenizers in the pipeline."""
    t5_tokenizer: ClassVar[str | None]
    """Name of the T5 tokenizer; None for a model family without T5."""
    optional_text_names: ClassVar[tuple[str, ...]] = ()
    """Names of the text encoder that a base may omit, and of its tokenizer."""

    frame_factor: int = 1
    """Number of video frames per latent frame (except the first, which is one frame)."""
    full_scale: Scale
    """The latent size of the training data of the model."""
    largest_scale: Scale | None = None
    """The largest latent size with position embeddings; None = no limit."""

    def __init__(
        self,
        pipeline: Any,
        config: Mapping[str, Any],
        vae_config: Mapping[str, Any],
        *,
        base: str,
        max_sequence_length: int | None = None,
    ) -> None:
        """Wrap a pipeline; `config` is the configuration of the denoiser, which may not be loaded.

        Weights are not frozen, because the pipeline may belong to the user; `load` and `tiny` freeze them.
        """
        self.pipeline, self.base, self.config = pipeline, base, config
        self._offloaded_text: list[nn.Module] = []
        self.execution_device: torch.device | None = None  # set by offloading
        self._truncation_reported = False
        self.vae_config = vae_config
        self.vae_factor = spatial_factor(vae_config)
        """Side length of a latent cell in pixels."""
        self.configure(config)
        self.max_sequence_length = max_sequence_length or self.default_sequence_length()

    def freeze(self) -> Self:
        """Freeze every loaded part (no gradients, evaluation mode), and return self."""
        for component in self._modules():
            component.requires_grad_(False)
            component.eval()
        return self

    @classmethod
    def from_pipeline(cls, pipeline: Any, *, base: str, max_sequence_length: int | None = None) -> Self:
        """Wrap a pipeline with denoiser and VAE, without changing it."""
        denoiser = getattr(pipeline, cls.denoiser_name)
        return cls(
            pipeline, denoiser.config, pipeline.vae.config, base=base, max_sequence_length=max_sequence_length
        )

    @classmethod
    @abstractmethod
    def tiny(cls, seed: int = 0) -> Self:
        """Create a tiny random model from the classes of the model family, including tokenizers."""

    @classmethod
    def from_tiny_pipeline(cls, pipeline: Any) -> Self:
        """Wrap and freeze the pipeline of a tiny model, without progress bars."""
        pipeline.set_progress_bar_config(disable=True)
        return cls.from_pipeline(pipeline, base=f"tiny-{cls.family}").freeze()

    @abstractmethod
    def configure(self, config: Mapping[str, Any]) -> None:
        """Set noise, patch, channels, blocks, width and full_scale from the configuration of the denoiser."""

    def set_guidance(self, guidance: float) -> None:
        """Set the guidance input of the network; warn for a model without that input."""
        if self.embedded_guidance is None:
            warnings.warn(
                f"model.embedded_guidance={guidance:g} has no effect: {self.base} does not take guidance as "
                "an input. Set it to null.",
                stacklevel=3,
            )
        else:
            self.embedded_guidance = guidance

    def default_sequence_length(self) -> int:
        """Return the default number of tokens of the long text encoder in training."""
        tokenizer = getattr(self.pipeline, self.t5_tokenizer or "tokenizer")
        return MAX_T5_TOKENS if tokenizer is None else min(MAX_T5_TOKENS, tokenizer.model_max_length)

    def pipeline_sequence_length(self) -> int:
        """Return the default number of tokens of the diffusers pipeline, used for samples of the teacher."""
        return self.default_sequence_length()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts; warn about those that a text encoder truncates."""
        self._component("text_encoder", "text")
        self.warn_of_truncation(prompts)
        with self.text_encoders_on_device() as device:
            return Condition(self.embed(list(prompts), device))

    @abstractmethod
    def embed(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """Run the text encoders on `device`; return embeddings [N, ...] by their names in a condition."""

    def encode_for_teacher(self, prompts: Sequence[str], length: int | None = None) -> Condition:
        """Encode prompts for sampling with the teacher, with `length` T5 tokens.

        None = the default of the diffusers pipeline. Raises ModelError for a length if there is no T5.
        """
        if length is not None and self.t5_tokenizer is None:
            raise ModelError(
                f"teacher.max_sequence_length={length} has no effect, because {self.base} has no T5. Set it "
                "to null."
            )
        before, self.max_sequence_length = self.max_sequence_length, length or self.pipeline_sequence_length()
        try:
            return self.encode_prompts(prompts)
        finally:
            self.max_sequence_length = before

    @abstractmethod
    def tokenizers(self) -> list[tuple[Any, int, str]]:
        """Return tokenizer, maximum number of tokens and name of every text encoder."""

    @abstractmethod
    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the embeddings of one prompt by their names in a condition."""

    def empty_condition(self, count: int, device: torch.device | str) -> Condition:
        """Return a condition of `count` prompts with uninitialized embeddings."""
        shapes = self.prompt_shapes().items()
        return Condition({name: torch.empty(count, *shape, device=device) for name, shape in shapes})

    @classmethod
    def parts(cls) -> dict[Part, tuple[str, ...]]:
        """Return the names of the components of the pipeline by part."""
        return {"denoiser": (cls.denoiser_name,), "vae": ("vae",), "text": cls.text_names}

    @classmethod
    def components(cls, base: str | Path) -> dict[str, tuple[str, str]]:
        """Return library and class of the components of a base; ModelError if a required one is missing."""
        required = (cls.denoiser_name, "vae", "scheduler", *cls.text_names)
        found = check_index(model_index(base), base, required=required, optional=cls.optional_text_names)
        optional = cls.optional_text_names
        if optional and optional[0] not in found:  # a tokenizer without its text encoder is not needed
            return {name: entry for name, entry in found.items() if name not in optional}
        return check_index(model_index(base), base, required=required)

    @classmethod
    def check_files(
        cls, base: str | Path, found: Mapping[str, tuple[str, str]], parts: Sequence[Part], *,
        variants: Mapping[str, str | None], other_vae: bool = False, planned: bool = False,
    ) -> None:  # fmt: skip
        """Raise ModelError for missing or damaged files of `parts`; weights may be missing if `planned`."""
        names = [cls.denoiser_name, "vae", "scheduler", *(cls.text_names if "text" in parts else ())]
        weights = [n for part in parts for n in cls.parts()[part] if not (n == "vae" and other_vae)]
        check_folder(base, found, names=names, weights=() if planned else weights, variants=variants)

    @classmethod
    def sequence_length_for(cls, components: Mapping[str, tuple[str, str]]) -> int | None:
        """Return the number of tokens for a base with these components; None = `default_sequence_length`."""
        return None

    @classmethod
    def vae_dtype(cls, vae_config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the VAE for a model in `dtype`; some VAEs need float32."""
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
        """Load `parts` of a model from a folder in diffusers' layout or a hub id, and freeze them.

        Only safetensors files are loaded. `vae`: folder or hub id of another VAE with the same latents, such
        as a tiny one (AutoencoderTiny). `variant`: "fp16" loads model.fp16.safetensors; None = the default
        weights, or the only variant available. Raises ModelError for missing, damaged or unsupported models.
        """
        pipeline, config, vae_config, found = load_pipeline(
            cls, str(base), dtype=dtype, parts=parts, vae=str(vae) if vae else None, variant=variant
        )
        longest = max_sequence_length or cls.sequence_length_for(found)
        return cls(pipeline, config, vae_config, base=str(base), max_sequence_length=longest).freeze()

    def save(self, folder: Path) -> None:
        """Save all components in diffusers' layout."""
        self.pipeline.save_pretrained(folder, safe_serialization=True)

    @property
    def denoiser(self) -> nn.Module:
        """The denoising network, which must be loaded."""
        return self._component(self.denoiser_name, "denoiser")

    @property
    def device(self) -> torch.device:
        """The device on which the parts run, also if their weights are offloaded."""
        if self.execution_device is not None:
            return self.execution_device
        # With the offloading of diffusers, the pipeline knows the execution device.
        hooks = ("_hf_hook", "_diffusers_hook")
        if any(hasattr(m, hook) for c in self._modules() for m in (c, *c.children()) for hook in hooks):
            return torch.device(self.pipeline._execution_device)
        resident = [c for c in self._modules() if c not in self._offloaded_text]
        if not resident:
            return self._text_device
        return next(p.device for c in resident for p in c.parameters())

    def to(self, device: torch.device | str) -> Self:
        """Move every loaded part except offloaded text encoders, and return self."""
        for component in self._modules():
            if component not in self._offloaded_text:
                component.to(device)
        return self

    def offload_text(self, device: torch.device | str) -> None:
        """Keep the text encoders in main memory, and move them to `device` only to encode prompts."""
        self._offloaded_text = [
            c for name in self.text_names if isinstance(c := getattr(self.pipeline, name, None), nn.Module)
        ]
        self._text_device = torch.device(device)

    @contextmanager
    def text_encoders_on_device(self) -> Iterator[torch.device]:
        """Move offloaded text encoders to their device within a `with` block; yield that device."""
        if not self._offloaded_text:
            yield self.device
            return
        for encoder in self._offloaded_text:
            encoder.to(self._text_device)
        try:
            yield self._text_device
        finally:
            for encoder in self._offloaded_text:
                encoder.to("cpu")

    def release(self, *parts: Part) -> None:
        """Remove parts that are no longer needed, to free memory."""
        for part in parts:
            for name in self.parts()[part]:
                setattr(self.pipeline, name, None)

    def warn_of_truncation(self, prompts: Sequence[str]) -> None:
        """Warn about prompts that a text encoder truncates, except within `warn_of_truncation_once`."""
        if not self._truncation_reported and (warning := describe_truncation(prompts, self.tokenizers())):
            warnings.warn(warning, stacklevel=4)

    @contextmanager
    def warn_of_truncation_once(self, prompts: Sequence[str], *, tokens: int | None = None) -> Iterator[None]:
        """Give one warning about all `prompts` that a text encoder truncates, and none within the `with`
        block.

        `tokens`: maximum number of T5 tokens, if it differs from that of `encode_prompts`.
        """
        before, length = self._truncation_reported, self.max_sequence_length
        self.max_sequence_length = tokens or length
        self.warn_of_truncation(prompts)
        self.max_sequence_length, self._truncation_reported = length, True
        try:
            yield
        finally:
            self._truncation_reported = before

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels [N, 3, H, W] (video [N, 3, T, H, W]) in [-1, 1] into latents [N, C, H, W]."""
        vae: Any = self._component("vae", "vae")
        found = vae.encode(pixels.to(self.device, vae.dtype))
        # The mode of the posterior, not a sample, so that the cached latent of an image is deterministic. A
        # tiny
        # VAE has no distribution.
        latents = found.latents if isinstance(vae, AutoencoderTiny) else found.latent_dist.mode()
        return self.normalize(latents.float())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [N, C, H, W] into pixels [N, 3, H, W] (video [N, 3, T, H, W]) in [-1, 1]."""
        vae: Any = self._component("vae", "vae")
        latents = self.denormalize(latents.float())
        return vae.decode(latents.to(self.device, vae.dtype)).sample.float().clamp(-1, 1)

    def normalize(self, latents: Tensor) -> Tensor:
        """Normalize VAE latents z [N, C, H, W] for the denoiser: (z - shift) * factor, of the same shape."""
        config = self._component("vae", "vae").config
        return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def denormalize(self, latents: Tensor) -> Tensor:
        """Invert `normalize` for latents [N, C, H, W]."""
        config = self._component("vae", "vae").config
        return latents / config.scaling_factor + (config.get("shift_factor") or 0.0)

    def pixel_size(self, scale: Scale) -> tuple[int, ...]:
        """Return height and width in pixels of a sample at a scale; for videos frames, height and width."""
        size = (scale.height * self.vae_factor, scale.width * self.vae_factor)
        return ((scale.frames - 1) * self.frame_factor + 1, *size) if self.video else size

    def check_schedule(self, schedule: ScaleSchedule) -> None:
        """Raise an error for a schedule with scales that the model does not support."""
        if any(scale.frames > 1 for scale in schedule.scales) and not self.video:
            raise ModelError(
                f"The schedule {schedule} has scales with frames, but {self.base} is a model for images. Use "
                "scales with height and width only."
            )
        if self.video and all(scale.frames == 1 for scale in schedule.scales) and self.full_scale.frames > 1:
            raise ModelError(
                f"The schedule {schedule} has scales without frames, but {self.base} is a model for videos. "
                "Use scales with frames, as in 21x60x104."
            )
        schedule.check(patch=self.patch, largest=self.largest_scale)

    def block(self, index: int) -> nn.Module:
        """Return a block by index; raise ModelError if the index is out of range."""
        if not 0 <= index < self.blocks:
            raise ModelError(f"Block {index} does not exist; use one of 0 to {self.blocks - 1}.")
        return self.block_list()[index]

    @abstractmethod
    def block_list(self) -> Sequence[nn.Module]:
        """Return all blocks whose features can be extracted, in execution order."""

    def repeated_blocks(self) -> list[nn.Module]:
        """Return the repeated modules of the network, for compiling, quantizing and counting."""
        return list(self.block_list())

    def compile_blocks(self, **options: Any) -> None:
        """Compile every repeated block of the denoiser; `options` go to torch.compile."""
        # After 8 versions of a function torch runs it uncompiled, and only writes a log message.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for block in self.repeated_blocks():
            block.compile(**options)

    def enable_checkpointing(self, function: Any) -> None:
        self.denoiser.enable_gradient_checkpointing(function)  # type: ignore[operator]

    def teacher_scheduler(self, steps: int, scale: Scale, *, shift: float | None = None) -> Any:
        """Return the scheduler of the base with timesteps for a scale; ModelError if it cannot be used."""
        return prepare_scheduler(
            self.pipeline.scheduler, steps, self.noise, base=self.base, shift=shift,
            options=lambda scheduler: self.scheduler_options(scheduler, steps, scale),
        )  # fmt: skip

    def scheduler_options(self, scheduler: Any, steps: int, scale: Scale) -> dict[str, Any]:
        """Return the arguments of `set_timesteps` in the diffusers pipeline, except the number of steps."""
        if scheduler.config.get("use_dynamic_shifting"):
            return {"mu": dynamic_shift(scheduler.config, self.token_count(scale))}
        return {}

    def _component(self, name: str, part: Part) -> Any:
        component = getattr(self.pipeline, name, None)
        assert component is not None, f"the {part} of {self.base} was not loaded"
        return component

    def _modules(self) -> list[nn.Module]:
        return [c for c in self.pipeline.components.values() if isinstance(c, nn.Module)]
