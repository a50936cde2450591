"""Diffusers pipelines for scale-wise sampling: subclasses of the stock pipelines with their own `__call__`.

The sampler is that of training (scalewise.method.sampling); the adapter handles details of a model family.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import (
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    WanPipeline,
)
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from diffusers.pipelines.stable_diffusion_3.pipeline_output import StableDiffusion3PipelineOutput
from diffusers.pipelines.stable_diffusion_xl.pipeline_output import StableDiffusionXLPipelineOutput
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps
from torch import Tensor

from scalewise.common.images import refuse_non_finite, to_rgb
from scalewise.method.rng import SampleNoise
from scalewise.method.sampling import sample_scale_wise
from scalewise.method.scales import Scale, ScaleSchedule, downscale_video, upscale_latents
from scalewise.models import SD3, SDXL, Condition, Flux, Wan, lora_keys
from scalewise.models.lora import Student, with_all_biases
from scalewise.pipelines import checks
from scalewise.pipelines.schedules import read_schedule

ADAPTER = "scalewise"
OUTPUTS = ("pil", "np", "pt", "latent")
Callback = Callable[[Any, int, float, dict[str, Tensor]], dict[str, Tensor] | None]


def stock_options(source: Any, target: Any) -> dict[str, Any]:
    """Return the configuration of a pipeline without its components."""
    return {k: v for k, v in source.config.items() if not k.startswith("_") and k not in target.components}


@contextmanager
def _quiet_lora_loading() -> Iterator[None]:
    """Hide the advice of diffusers that the student has no weights for text encoders."""
    logger = logging.getLogger("diffusers.loaders")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class ScaleWisePipeline:
    """Mixin for stock pipelines: few-step sampling that starts with a small latent and upscales it."""

    family: ClassVar[Any]
    output: ClassVar[Any]
    max_sequence_length: int | None = None
    embedded_guidance: float | None = None
    """Guidance input of the network, as in training; None = the default of the model family."""
    _schedule: ScaleSchedule | None = None

    @property
    def schedule(self) -> ScaleSchedule:
        """The timesteps and scales of the student."""
        assert self._schedule is not None, "set by load() or set_schedule()"
        return self._schedule

    def set_schedule(self, schedule: str | ScaleSchedule) -> None:
        """Set the schedule; raise an error if the model does not support it."""
        schedule = read_schedule(schedule)
        self.adapter().check_schedule(schedule)
        self._schedule = schedule

    def set_student(self, student: Student, *, weight: float = 1.0) -> None:
        """Load a student as the adapter "scalewise", replacing a previous student; set its schedule.

        To combine it with another LoRA, call `load_lora_weights`, then `set_adapters([ADAPTER, "style"])`.
        """
        pipeline: Any = self
        name = self.family.denoiser_name
        self.adapter().check_schedule(student.schedule)
        matched = with_all_biases(student.match_to(getattr(pipeline, name)).tensors, getattr(pipeline, name))
        if ADAPTER in pipeline.get_list_adapters().get(name, []):
            pipeline.delete_adapters(ADAPTER)
        # Without a config diffusers sets alpha = rank, so alpha / rank is multiplied into B.
        scale = student.alpha / student.rank
        tensors = {k: v * scale if ".lora_B." in k else v for k, v in matched.items()}
        named = lora_keys.write_names(tensors, "diffusers", denoiser=name, alpha=torch.tensor(1.0))
        with (
            _quiet_lora_loading()
        ):  # that the student has no weights for text encoders, which is as it should be
            pipeline.load_lora_weights(named, adapter_name=ADAPTER)
        pipeline.set_adapters([ADAPTER], [weight])
        self._schedule = student.schedule

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Save the base as a stock pipeline, for `scalewise.load` and diffusers."""
        pipeline: Any = self
        if loaded := pipeline.get_list_adapters():
            adapters = ", ".join(sorted({name for names in loaded.values() for name in names}))
            raise ValueError(
                f"A pipeline with adapters ({adapters}) cannot be saved; keep the base and the student "
                "file, or call fuse_lora() and unload_lora_weights() first."
            )
        stock = self.family.pipeline_class(**pipeline.components)
        stock.register_to_config(**stock_options(pipeline, stock))
        stock.save_pretrained(folder, **options)

    def compile_blocks(self, **options: Any) -> None:
        """Compile every repeated block of the denoiser; `options` go to torch.compile.

        Works for all model families (`compile_repeated_blocks` of diffusers does not support SD3). Call it
        after loading the student. torch compiles each type of block for the first scale and then once for all
        other scales; with dynamic=False it compiles for every scale, which gives the fastest sampling.
        """
        self.adapter().compile_blocks(**options)

    def adapter(self) -> Any:
        """Return an adapter around this pipeline."""
        pipeline: Any = self
        model = self.family.from_pipeline(
            pipeline, base=pipeline.name_or_path or "the pipeline",
            max_sequence_length=self.max_sequence_length,
        )  # fmt: skip
        if self.embedded_guidance is not None:
            model.set_guidance(self.embedded_guidance)
        return model

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        schedule: str | ScaleSchedule | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | Sequence[int] | None = None,
        image: Any = None,
        strength: float | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        **others: Any,
    ) -> Any:
        """Generate images or videos from prompts; `height`, `width` and `num_frames` default to the schedule.

        `generator`: one torch.Generator, or one per sample. `seed`: sample i uses seed + i, or seeds[i],
        independent of the batch. `image`: start from images [N, 3, H, W] in [0, 1] or PIL images, at the
        first step with timestep t <= 1000 x `strength` (in (0, 1], default 0.8); the image is encoded at the
        scale before that step, as in training. `callback_on_step_end(pipe, i, t, {"latents": x0})` may return
        {"latents": replacement} or None. Returns `.images` or `.frames`, like the stock pipeline; raises
        ValueError for arguments that the model does not support.
        """
        own = self.schedule if schedule is None else read_schedule(schedule)
        stock = self.family.pipeline_class.__call__
        checks.check_options(others, len(own), stock, ScaleWisePipeline.__call__)
        checks.check_integers(
            height=height, width=width, num_frames=num_frames, num_images_per_prompt=num_images_per_prompt
        )
        checks.check_callback(callback_on_step_end)
        checks.check_negative_prompt(negative_prompt)
        strength = checks.check_strength(strength, image)
        prompts = [p for p in checks.check_prompts(prompt) for _ in range(num_images_per_prompt)]
        model = self.adapter()
        if guidance_scale is not None:
            self._check_guidance(model, guidance_scale)
        if not prompts or output_type not in OUTPUTS:
            if not prompts:
                raise ValueError(f"prompt is {prompt!r}; pass at least one prompt.")
            raise ValueError(f"output_type must be one of {OUTPUTS}; got {output_type!r}.")
        model.check_schedule(own)
        plan = own.for_size(self._full_scale(model, height, width, num_frames, own), model.patch)
        plan.check(patch=model.patch, largest=model.largest_scale)
        noise = self._noise(len(prompts), generator, seed)
        cond = model.encode_prompts(prompts)
        start, latents = 0, None
        if image is not None:
            start, latents = self._start_from(model, image, strength, plan=plan, count=len(prompts))
        x0 = self._sample(
            model, plan, cond, noise=noise, start=start, latents=latents, callback=callback_on_step_end
        )
        return self._finish(model, x0, output_type, return_dict=return_dict)

    def _check_guidance(self, model: Any, guidance: float) -> None:
        if model.embedded_guidance is None:
            raise ValueError(
                f"guidance_scale {guidance:g} has no effect, because the student samples without "
                "classifier-free guidance; omit it."
            )
        model.set_guidance(guidance)

    def _full_scale(
        self, model: Any, height: int | None, width: int | None, frames: int | None, schedule: ScaleSchedule
    ) -> Scale:
        full, cell = schedule.full, model.vae_factor * model.patch
        for name, size in (("height", height), ("width", width)):
            if size is not None and size % cell:
                near = max(1, round(size / cell)) * cell
                raise ValueError(f"{name} must be divisible by {cell}; got {size}, the nearest is {near}.")
        if frames is not None and not model.video:
            raise ValueError(f"num_frames {frames} has no effect on a model for images; omit it.")
        if frames is not None and (frames - 1) % model.frame_factor:
            near = max(0, round((frames - 1) / model.frame_factor)) * model.frame_factor + 1
            raise ValueError(
                f"num_frames must be {model.frame_factor} k + 1; got {frames}, the nearest is {near}."
            )
        return Scale(
            full.frames if frames is None else (frames - 1) // model.frame_factor + 1,
            full.height if height is None else height // model.vae_factor,
            full.width if width is None else width // model.vae_factor,
        )

    @staticmethod
    def _noise(
        count: int, generator: torch.Generator | Sequence[torch.Generator] | None,
        seed: int | Sequence[int] | None,
    ) -> Any:  # fmt: skip
        checks.check_generators(generator, count)
        if seed is None:
            generators = list(generator) if isinstance(generator, Sequence) else generator
            return lambda shape, device: randn_tensor((count, *shape), generator=generators, device=device)
        if generator is not None:
            raise ValueError("generator and seed cannot be combined; pass only one of them.")
        return SampleNoise(checks.check_seeds(seed, count))

    def _start_from(
        self, model: Any, image: Any, strength: float, *, plan: ScaleSchedule, count: int
    ) -> tuple[int, Tensor]:
        """Return the step at which an image enters, and its latents [N, C, H, W] at the scale before."""
        timesteps = [step.t for step in plan]
        # The tolerance is for timesteps such as 602.15, which the message shows as 0.602.
        start = next((i for i, t in enumerate(timesteps) if t <= 1000 * strength + 0.5), None)
        if start is None:
            raise ValueError(
                f"strength {strength:g} is below all timesteps of the schedule; use one of "
                f"{', '.join(f'{t / 1000:.3g}' for t in reversed(timesteps))}, or a value between them."
            )
        pixels = self._pixels(model, image, model.pixel_size(plan.full))
        if len(pixels) not in (1, count):
            raise ValueError(
                f"There are {len(pixels)} images for {count} prompts; pass one, or one per prompt."
            )
        pixels = (2 * pixels.float() - 1).expand(count, *pixels.shape[1:])
        return start, model.encode(downscale_video(pixels, model.pixel_size(plan.source(start))))

    @staticmethod
    def _pixels(model: Any, image: Any, size: tuple[int, ...]) -> Tensor:
        """Return images [N, 3, H, W] (video [N, 3, T, H, W]) in [0, 1]; PIL images are cropped to `size`.

        A list of PIL images is a batch of images or the frames of one video.
        """
        if not isinstance(image, Tensor):
            images = image if isinstance(image, list | tuple) else [image]
            if unsupported := [i for i in images if not isinstance(i, Image.Image)]:
                raise ValueError(
                    f"image must be a PIL image or a tensor, not {type(unsupported[0]).__name__}; open a "
                    "file with PIL.Image.open, or convert an array with PIL.Image.fromarray."
                )
            if model.video and len(images) != size[0]:
                raise ValueError(f"image has {len(images)} frames; pass {size[0]}, the number generated.")
            upright = [to_rgb(ImageOps.exif_transpose(i)) for i in images]
            fitted = [ImageOps.fit(i, (size[-1], size[-2])) for i in upright]
            image = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) / 255 for i in fitted])
            if model.video:
                image = image.transpose(0, 1).unsqueeze(0)
        if not image.is_floating_point() or image.min() < 0 or image.max() > 1:
            found = f"{str(image.dtype).removeprefix('torch.')} from {image.min():g} to {image.max():g}"
            raise ValueError(f"An image tensor must contain floats in [0, 1]; got {found}.")
        if tuple(image.shape[1:]) != (3, *size):
            raise ValueError(
                f"An image tensor must have the shape [N, 3, {', '.join(map(str, size))}]; got "
                f"{list(image.shape)}. Resize it, or pass PIL images, which are cropped."
            )
        return image

    def _sample(
        self, model: Any, plan: ScaleSchedule, cond: Condition, *, noise: Any, start: int,
        latents: Tensor | None, callback: Callback | None,
    ) -> Tensor:  # fmt: skip
        """Run the sampler with a progress bar and the callback; return x0 [N, C, H, W]."""
        pipeline: Any = self
        remaining = ScaleSchedule(plan.steps[start:])
        if latents is not None:
            latents = upscale_latents(latents, remaining[0].scale)

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            found: Tensor = model.noise.x0(model.predict(x_t, t, cond), x_t, t)
            return found

        with pipeline.progress_bar(total=len(remaining)) as bar:

            def on_step(i: int, x0: Tensor) -> Tensor | None:
                bar.update()
                step = start + i
                result = callback(self, step, plan[step].t, {"latents": x0}) if callback else None
                return checks.latents_from_callback(result, x0, step)

            return sample_scale_wise(
                predict, remaining, model.noise, noise, channels=model.channels, video=model.video,
                device=model.device, start=latents, on_step=on_step,
            )  # fmt: skip

    def _finish(self, model: Any, x0: Tensor, output_type: str, *, return_dict: bool) -> Any:
        pipeline: Any = self
        refuse_non_finite(x0)
        if output_type == "latent":
            found: Any = x0
        elif model.video:
            found = pipeline.video_processor.postprocess_video(model.decode(x0), output_type=output_type)
        else:
            found = pipeline.image_processor.postprocess(model.decode(x0), output_type=output_type)
        pipeline.maybe_free_model_hooks()
        return self.output(found) if return_dict else (found,)


class ScaleWiseSD3Pipeline(ScaleWisePipeline, StableDiffusion3Pipeline):
    """Scale-wise sampling with SD3.5 and with the mini."""

    family = SD3
    output = StableDiffusion3PipelineOutput


class ScaleWiseFluxPipeline(ScaleWisePipeline, FluxPipeline):
    """Scale-wise sampling with FLUX.1; `guidance_scale` is the guidance input of the network."""

    family = Flux
    output = FluxPipelineOutput


class ScaleWiseSDXLPipeline(ScaleWisePipeline, StableDiffusionXLPipeline):
    """Scale-wise sampling with SDXL."""

    family = SDXL
    output = StableDiffusionXLPipelineOutput


class ScaleWiseWanPipeline(ScaleWisePipeline, WanPipeline):
    """Scale-wise sampling of videos with Wan2.1."""

    family = Wan
    output = WanPipelineOutput
