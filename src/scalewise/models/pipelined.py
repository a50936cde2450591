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
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from safetensors import SafetensorError
from torch import Tensor, nn

from scalewise.errors import first_line
from scalewise.models.base import ALL_PARTS, Condition, ModelAdapter, ModelError, Part
from scalewise.models.long_prompts import overlong, warned_once
from scalewise.models.shift import shifted
from scalewise.scales import Scale


class PipelineAdapter(ModelAdapter):
    """An adapter around the family's own diffusers pipeline, of which any part may be missing."""

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    text_names: ClassVar[tuple[str, ...]]
    reads_t5: ClassVar[bool] = True

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
    ) -> Self:
        names = cls.parts()
        chosen: dict[str, Any] = {n: None for part in ALL_PARTS if part not in parts for n in names[part]}
        with loading(f"the model {base}"):
            config = AutoencoderKL.load_config(str(base), subfolder=cls.denoiser_name)
            where = {"pretrained_model_name_or_path": str(vae)} if vae else {
                "pretrained_model_name_or_path": str(base), "subfolder": "vae"}  # fmt: skip
            with loading(f"the autoencoder {vae}" if vae else f"the model {base}"):
                vae_config = with_defaults(AutoencoderKL.load_config(**where))
            kind = cls.vae_dtype(vae_config, dtype)
            if vae:
                check_vae(vae_config, AutoencoderKL.load_config(str(base), subfolder="vae"), str(vae))
            if "vae" in parts and (vae or kind != dtype):
                vae_class = vae_class_of(vae_config)
                with loading(f"the autoencoder of {vae or base}"):
                    chosen["vae"] = vae_class.from_pretrained(**where, torch_dtype=kind, use_safetensors=True)
            if "text" in parts:
                chosen |= text_encoders(cls.pipeline_class, cls.text_names, str(base), dtype=dtype)
            pipeline = cls.pipeline_class.from_pretrained(
                str(base), dtype=dtype, use_safetensors=True, **chosen
            )
        check_complete(pipeline, str(base))
        check_tokenizers(pipeline, cls.text_names, str(base))
        model = cls(pipeline, config, vae_config, base=str(base), max_sequence_length=max_sequence_length)
        return model.freeze()

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
        options = self.scheduler_options(scheduler, steps, scale)
        if shift is not None:
            scheduler, own = shifted(scheduler, shift, base=self.base)
            options |= own
        scheduler.set_timesteps(steps, **options)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        if "generator" in inspect.signature(scheduler.step).parameters and is_stochastic(scheduler):
            raise ModelError(
                f"The scheduler {type(scheduler).__name__} of {self.base} draws noise of its own, so samples "
                "could not be made again; put a deterministic one, such as EulerDiscreteScheduler or "
                "DDIMScheduler, into the base's scheduler folder."
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


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn what goes wrong while a part is found and read into a ModelError that names it."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"Cannot load {what}: {first_line(error)}") from error


def text_encoders(
    pipeline_class: type[DiffusionPipeline], names: Sequence[str], base: str, *, dtype: torch.dtype
) -> dict[str, Any]:
    """Load a base's text encoders; weights that its files lack are an error, not drawn at random."""
    index, found = pipeline_class.load_config(base), {}
    for name in names:
        library, kind = index.get(name) or ("", "")
        if library != "transformers" or not name.startswith("text_encoder"):
            continue
        found[name], report = getattr(transformers, kind).from_pretrained(
            base, subfolder=name, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        missing = sorted(report["missing_keys"])
        if missing:
            raise ModelError(
                f"The {name} of {base} lacks {len(missing)} of its weights, for example {missing[0]}. Fetch "
                "the model again."
            )
    return found


def check_complete(pipeline: Any, base: str) -> None:
    """Refuse modules with weights that their files lack; diffusers leaves those on the meta device."""
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            empty = [key for key, value in component.named_parameters() if value.is_meta]
            if empty:
                raise ModelError(
                    f"The {name} of {base} lacks {len(empty)} of its weights, for example {empty[0]}. Fetch "
                    "the model again."
                )


def check_tokenizers(pipeline: Any, names: Sequence[str], base: str) -> None:
    """Refuse a tokenizer whose files are missing: transformers makes one of a handful of words instead."""
    for name in names:
        tokenizer = getattr(pipeline, name, None)
        encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"), None)
        if not name.startswith("tokenizer") or tokenizer is None or encoder is None:
            continue
        gone = Path(base).is_dir() and not (Path(base) / name).is_dir()
        # Some text encoders have a few more embeddings than words.
        if gone or len(tokenizer) < encoder.config.vocab_size / 2:
            raise ModelError(
                f"The {name} of {base} knows {len(tokenizer)} words where its text encoder has "
                f"{encoder.config.vocab_size}: files are missing there. Fetch the model again."
            )


def is_stochastic(scheduler: Any) -> bool:
    """Whether a scheduler, whose timesteps are set, draws noise of its own: tried out on its first step."""
    found = []
    for seed in (0, 1):
        probe, x_t = copy.deepcopy(scheduler), torch.ones(1, 1, 2, 2)
        t, rng = probe.timesteps[0], torch.Generator().manual_seed(seed)
        x_t = probe.scale_model_input(x_t, t) if hasattr(probe, "scale_model_input") else x_t
        found.append(probe.step(torch.zeros_like(x_t), t, x_t, generator=rng, return_dict=False)[0])
    return not torch.equal(*found)


def check_vae(other: Mapping[str, Any], own: Mapping[str, Any], place: str) -> None:
    """Refuse an autoencoder whose latents are not the base's own: other channels, or pictures for video."""
    own = with_defaults(own)
    for what in ("latent_channels", "z_dim", "scale_factor_temporal"):
        if other.get(what) != own.get(what):
            raise ModelError(
                f"The VAE {place} has {what} {other.get(what)} and the base's has {own.get(what)}, so its "
                "latents are others. Give one that was made for this base."
            )


def with_defaults(vae_config: Mapping[str, Any]) -> dict[str, Any]:
    """A VAE's configuration with its class's own defaults: files written before a setting came lack it."""
    kind = vae_class_of(vae_config)
    options = inspect.signature(kind.__init__).parameters
    defaults = {name: o.default for name, o in options.items() if o.default is not o.empty}
    return {**defaults, **vae_config}


def spatial_factor(vae_config: Mapping[str, Any]) -> int:
    """Pixels along each side of a latent cell."""
    if "scale_factor_spatial" in vae_config:
        return int(vae_config["scale_factor_spatial"])
    levels = vae_config.get("encoder_block_out_channels") or vae_config["block_out_channels"]
    return 2 ** (len(levels) - 1)


def vae_class_of(vae_config: Mapping[str, Any]) -> Any:
    """The class that a VAE's configuration names, if diffusers has it and it is an autoencoder."""
    import diffusers

    name = str(vae_config.get("_class_name", ""))
    if not name.startswith("Autoencoder") or not hasattr(diffusers, name):
        raise ModelError(f"{name or 'a nameless class'} is no autoencoder of diffusers; give another VAE.")
    return getattr(diffusers, name)


def dynamic_shift(config: Mapping[str, Any], tokens: int) -> float:
    """The shift mu of a flow-matching schedule that depends on the number of image tokens: a line through
    (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift).
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return base + (top - base) * (tokens - low) / (high - low)
