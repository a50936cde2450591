"""What all families share: a diffusers pipeline whose parts are loaded, frozen, moved and dropped."""

from __future__ import annotations

import copy
import inspect
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from torch import Tensor, nn

from scalewise.method.adapter import ALL_PARTS, Condition, ModelAdapter, ModelError, Part
from scalewise.method.noise import FlowMatching
from scalewise.method.scales import Scale
from scalewise.models.folder import (
    check_index,
    diffusers_class,
    model_index,
    variants_of,
)
from scalewise.models.intact import check_folder
from scalewise.models.loading import (
    autoencoder_config,
    check_complete,
    check_tokenizers,
    component_config,
    load_component,
    loading,
    other_autoencoder,
    refuse_non_finite,
    settle_lengths,
    spatial_factor,
    text_encoders,
    vae_class_of,
)
from scalewise.models.long_prompts import overlong, warned_once
from scalewise.models.schedulers import dynamic_shift, for_flow_matching, is_stochastic, refuse_inverted
from scalewise.models.shift import shifted


class PipelineAdapter(ModelAdapter):
    """An adapter around the family's own diffusers pipeline, of which any part may be missing."""

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    text_names: ClassVar[tuple[str, ...]]
    reads_t5: ClassVar[bool] = True
    optional_texts: ClassVar[tuple[str, ...]] = ()
    """The text encoder that a base may do without, and its tokenizer."""

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
        self.vae_config, self.vae_factor = vae_config, spatial_factor(vae_config)
        self.describe(config)
        self.max_sequence_length = max_sequence_length or self.longest_sequence()

    def freeze(self) -> Self:
        """Switch off gradients and training mode of every loaded part."""
        for component in self._modules():
            component.requires_grad_(False)
            component.eval()
        return self

    @abstractmethod
    def describe(self, config: Mapping[str, Any]) -> None:
        """Set noise, patch, channels, blocks, width, full_scale and largest_scale from the configuration."""

    @abstractmethod
    def longest_sequence(self) -> int:
        """Tokens that the long text encoder reads unless told otherwise."""

    def stock_sequence(self) -> int:
        """Tokens that the family's own pipeline lets it read, as the teacher does when it samples."""
        return self.longest_sequence()

    def encode_for_teacher(self, prompts: Sequence[str], length: int | None = None) -> Condition:
        if length is not None and not self.reads_t5:
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
        names, place = cls.parts(), str(base)
        with loading(f"the model {base}"):
            found = cls.components(base)
            variants = variants_of(base, found.keys(), variant)
            cls.check_files(base, found, parts, variants=variants, other_vae=vae is not None)
            left_out = [n for part in ALL_PARTS if part not in parts for n in names[part]]
            left_out += [n for n in cls.text_names if n not in found]
            chosen: dict[str, Any] = dict.fromkeys(left_out)
            config = component_config(place, cls.denoiser_name, found)
            own_vae = component_config(place, "vae", found)
            vae_config = autoencoder_config(str(vae), own_vae) if vae else own_vae
            if "vae" in parts:
                kind, half = vae_class_of(vae_config), cls.vae_dtype(vae_config, dtype)
                if vae:
                    chosen["vae"] = other_autoencoder(str(vae), kind, dtype=half)
                else:
                    chosen["vae"] = load_component(place, "vae", kind, dtype=half, variant=variants["vae"])
            if "text" in parts:
                chosen |= text_encoders(place, found, cls.text_names, dtype=dtype, variants=variants)
            if "denoiser" in parts:
                kind, name = diffusers_class(found, cls.denoiser_name, base), cls.denoiser_name
                chosen[name] = load_component(place, name, kind, dtype=dtype, variant=variants[name])
            pipeline = cls.pipeline_class.from_pretrained(place, dtype=dtype, use_safetensors=True, **chosen)
        refuse_inverted(pipeline.scheduler.config, place)
        check_complete(pipeline, place)
        refuse_non_finite(pipeline, place, vae=str(vae or base))
        check_tokenizers(pipeline, cls.text_names, place)
        settle_lengths(pipeline, cls.text_names)
        longest = max_sequence_length or cls.usual_sequence(found)
        return cls(pipeline, config, vae_config, base=place, max_sequence_length=longest).freeze()

    def save(self, folder: Path) -> None:
        self.pipeline.save_pretrained(folder, safe_serialization=True)

    @property
    def denoiser(self) -> nn.Module:  # type: ignore[override]
        return self._need(self.denoiser_name, "denoiser")

    @property
    def device(self) -> torch.device:
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
        for part in parts:
            for name in self.parts()[part]:
                setattr(self.pipeline, name, None)

    def warn_of_overflow(self, prompts: Sequence[str]) -> None:
        """Warn, once for all, of prompts whose end a text encoder will not read; not within `warned_once`."""
        if not self.warned and (told := overlong(prompts, self.tokenizers())):
            warnings.warn(told, stacklevel=4)

    def warned_once(
        self, prompts: Sequence[str], *, tokens: int | None = None
    ) -> AbstractContextManager[None]:
        return warned_once(self, prompts, tokens)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        vae: Any = self._need("vae", "vae")
        found = vae.encode(pixels.to(self.device, vae.dtype))
        # The mode and not a draw: the cached latent of an image is the same whenever it is made. A tiny
        # autoencoder has no distribution.
        latents = found.latents if isinstance(vae, AutoencoderTiny) else found.latent_dist.mode()
        return self.normalise(latents.float())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
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

    def block(self, index: int) -> nn.Module:
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

    def teacher_scheduler(self, steps: int, scale: Scale, *, shift: float | None = None) -> Any:
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        if flow := isinstance(self.noise, FlowMatching):
            needed = self.scheduler_options(scheduler, steps, scale)
            scheduler = for_flow_matching(scheduler, needed, base=self.base)
        options = self.scheduler_options(scheduler, steps, scale)
        if shift is not None:
            scheduler, own = shifted(scheduler, shift, base=self.base)
            options |= own
        scheduler.set_timesteps(steps, **options)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        usual = "FlowMatchEulerDiscreteScheduler" if flow else "EulerDiscreteScheduler or DDIMScheduler"
        if "generator" in inspect.signature(scheduler.step).parameters and is_stochastic(scheduler):
            raise ModelError(
                f"The scheduler {type(scheduler).__name__} of {self.base} draws noise of its own, so samples "
                f"could not be made again; put a deterministic one, such as {usual}, into the base's "
                "scheduler folder."
            )
        return scheduler

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
