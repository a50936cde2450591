"""Scale-wise sampling as diffusers pipelines: the stock classes, with another `__call__`.

The sampler is the one of training (scalewise.method.sampling); what a family needs is asked of its adapter.
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
    """Settings of a pipeline that are no components, such as SDXL's zeros for an empty prompt."""
    return {k: v for k, v in source.config.items() if not k.startswith("_") and k not in target.components}


@contextmanager
def _without_advice() -> Iterator[None]:
    logger = logging.getLogger("diffusers.loaders")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class ScaleWisePipeline:
    """Mixed into a stock pipeline: few-step sampling that starts on a small latent and grows it."""

    family: ClassVar[Any]
    output: ClassVar[Any]
    max_sequence_length: int | None = None
    embedded_guidance: float | None = None
    """What the student was told in training where guidance is an input; None = the family's standard."""
    _schedule: ScaleSchedule | None = None

    @property
    def schedule(self) -> ScaleSchedule:
        """Timesteps and scales of the student."""
        assert self._schedule is not None, "load() or set_schedule() give the schedule"
        return self._schedule

    def set_schedule(self, schedule: str | ScaleSchedule) -> None:
        """Sample with this schedule from now on; one that does not fit the model is refused."""
        schedule = read_schedule(schedule)
        self.adapter().check_schedule(schedule)
        self._schedule = schedule

    def set_student(self, student: Student, *, weight: float = 1.0) -> None:
        """Sample with a student, attached as the adapter "scalewise" in place of one that may be there.

        Others may stand beside it: `load_lora_weights` of a style, then `set_adapters([ADAPTER, "style"])`.
        """
        pipeline: Any = self
        name = self.family.denoiser_name
        self.adapter().check_schedule(student.schedule)
        matched = with_all_biases(student.matched(getattr(pipeline, name)).tensors, getattr(pipeline, name))
        if ADAPTER in pipeline.get_list_adapters().get(name, []):
            pipeline.delete_adapters(ADAPTER)
        # diffusers takes rank and alpha from the shapes; with alpha / rank in B, weight 1 is the student.
        scale = student.alpha / student.rank
        tensors = {k: v * scale if ".lora_B." in k else v for k, v in matched.items()}
        named = lora_keys.write_names(tensors, "diffusers", denoiser=name, alpha=torch.tensor(1.0))
        with _without_advice():  # that the student has no weights for text encoders, which is as it should be
            pipeline.load_lora_weights(named, adapter_name=ADAPTER)
        pipeline.set_adapters([ADAPTER], [weight])
        self._schedule = student.schedule

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Save the base as the stock pipeline does, for `scalewise.load` and diffusers alike."""
        pipeline: Any = self
        if pipeline.get_list_adapters():
            raise ValueError(
                "A pipeline is not saved together with its adapters: keep the base and the student's file, "
                "or call fuse_lora() and unload_lora_weights() first."
            )
        stock = self.family.pipeline_class(**pipeline.components)
        stock.register_to_config(**stock_options(pipeline, stock))
        stock.save_pretrained(folder, **options)

    def compile_blocks(self, **options: Any) -> None:
        """Compile every repeated block of the denoiser; `options` go to torch.compile.

        All families can (diffusers' `compile_repeated_blocks` knows no blocks of SD3). Call it after the
        student is loaded. torch compiles each kind of block for the first scale and then once more, for all
        others; with dynamic=False for every scale of the schedule, which draws fastest.
        """
        self.adapter().compile_blocks(**options)

    def adapter(self) -> Any:
        """The family's adapter around this very pipeline."""
        pipeline: Any = self
        model = self.family.around(
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
        """Draw samples of prompts; the sizes are pixels (and frames), any that the model can take.

        `generator`: one torch.Generator, or one a sample; `seed`: sample i takes seed + i, or seeds[i],
        whatever the batch. `image` and `strength` in (0, 1], 0.8 unless given: start from pictures
        [N, 3, H, W] in [0, 1] or PIL images, at the first step whose level t is at most 1000 x strength; the
        picture enters at the scale before that step's, as the data did in training.
        `callback_on_step_end(pipe, i, t, {"latents": x0})` may return {"latents": other}, or None. Returns
        `.images`, or `.frames` of a video, like the stock pipeline.
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
            fault = f"output_type {output_type!r}" if prompts else "no prompt"
            raise ValueError(f"There is nothing to draw with {fault}; give prompts, and one of {OUTPUTS}.")
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
                f"guidance_scale {guidance:g} has no effect here: the student samples without "
                "classifier-free guidance. Leave it out."
            )
        model.set_guidance(guidance)

    def _full_scale(
        self, model: Any, height: int | None, width: int | None, frames: int | None, schedule: ScaleSchedule
    ) -> Scale:
        full, cell = schedule.full, model.vae_factor * model.patch
        for name, size in (("height", height), ("width", width)):
            if size is not None and size % cell:
                near = max(1, round(size / cell)) * cell
                raise ValueError(f"{name} {size} is not divisible by {cell}; {near} would be.")
        if frames is not None and not model.video:
            raise ValueError("num_frames has no effect: this is a model for images. Leave it out.")
        if frames is not None and (frames - 1) % model.frame_factor:
            near = max(0, round((frames - 1) / model.frame_factor)) * model.frame_factor + 1
            raise ValueError(f"num_frames {frames} is not {model.frame_factor} k + 1; {near} would be.")
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
            several = list(generator) if isinstance(generator, Sequence) else generator
            return lambda shape, device: randn_tensor((count, *shape), generator=several, device=device)
        if generator is not None:
            raise ValueError("Give generator or seed, not both.")
        return SampleNoise(checks.check_seeds(seed, count))

    def _start_from(
        self, model: Any, image: Any, strength: float, *, plan: ScaleSchedule, count: int
    ) -> tuple[int, Tensor]:
        """The step at which a picture enters, and its latents at the scale before."""
        levels = [step.t for step in plan]
        # Levels such as 602.15 are shown as 0.602, which has to reach them.
        start = next((i for i, t in enumerate(levels) if t <= 1000 * strength + 0.5), None)
        if start is None:
            raise ValueError(
                f"strength {strength:g} lies below every step of the schedule; use one of "
                f"{', '.join(f'{t / 1000:.3g}' for t in reversed(levels))}, or between them."
            )
        pixels = self._pixels(model, image, model.pixel_size(plan.full))
        if len(pixels) not in (1, count):
            raise ValueError(f"{len(pixels)} pictures for {count} prompts; give one, or one for each.")
        pixels = (2 * pixels.float() - 1).expand(count, *pixels.shape[1:])
        return start, model.encode(downscale_video(pixels, model.pixel_size(plan.source(start))))

    @staticmethod
    def _pixels(model: Any, image: Any, size: tuple[int, ...]) -> Tensor:
        """Pictures [N, 3, H, W] (video [N, 3, F, H, W]) in [0, 1]. PIL images are cropped to the size drawn;
        a list of them is a batch, or the frames of one video.
        """
        if not isinstance(image, Tensor):
            pictures = image if isinstance(image, list | tuple) else [image]
            strangers = [p for p in pictures if not isinstance(p, Image.Image)]
            if strangers:
                raise ValueError(
                    f"A picture is a PIL image or a tensor, not {type(strangers[0]).__name__}; open a file "
                    "with PIL.Image.open, turn an array into an image with PIL.Image.fromarray."
                )
            if model.video and len(pictures) != size[0]:
                raise ValueError(f"{len(pictures)} frames are given and {size[0]} drawn; give as many.")
            upright = [to_rgb(ImageOps.exif_transpose(picture)) for picture in pictures]
            fitted = [ImageOps.fit(picture, (size[-1], size[-2])) for picture in upright]
            image = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 255 for p in fitted])
            if model.video:
                image = image.transpose(0, 1).unsqueeze(0)
        if not image.is_floating_point() or image.min() < 0 or image.max() > 1:
            found = f"{str(image.dtype).removeprefix('torch.')} from {image.min():g} to {image.max():g}"
            raise ValueError(f"Pixels of a tensor are floats in [0, 1], not {found}; bring them there.")
        if tuple(image.shape[1:]) != (3, *size):
            raise ValueError(
                f"The picture has the shape {list(image.shape)}, but [N, 3, {', '.join(map(str, size))}] is "
                "drawn; resize it, or give PIL images, which are cropped."
            )
        return image

    def _sample(
        self, model: Any, plan: ScaleSchedule, cond: Condition, *, noise: Any, start: int,
        latents: Tensor | None, callback: Callback | None,
    ) -> Tensor:  # fmt: skip
        """Run the sampler under the pipeline's progress bar; the callback sees x0 and may change it."""
        pipeline: Any = self
        rest = ScaleSchedule(plan.steps[start:])
        if latents is not None:
            latents = upscale_latents(latents, rest[0].scale)

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            found: Tensor = model.noise.x0(model.predict(x_t, t, cond), x_t, t)
            return found

        with pipeline.progress_bar(total=len(rest)) as bar:

            def on_step(i: int, x0: Tensor) -> Tensor | None:
                bar.update()
                step = start + i
                told = callback(self, step, plan[step].t, {"latents": x0}) if callback else None
                return checks.changed_latents(told, x0, step)

            return sample_scale_wise(
                predict, rest, model.noise, noise, channels=model.channels, video=model.video,
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
    """SD3.5 and the mini."""

    family = SD3
    output = StableDiffusion3PipelineOutput


class ScaleWiseFluxPipeline(ScaleWisePipeline, FluxPipeline):
    """FLUX.1; `guidance_scale` is its embedded guidance."""

    family = Flux
    output = FluxPipelineOutput


class ScaleWiseSDXLPipeline(ScaleWisePipeline, StableDiffusionXLPipeline):
    """SDXL."""

    family = SDXL
    output = StableDiffusionXLPipelineOutput


class ScaleWiseWanPipeline(ScaleWisePipeline, WanPipeline):
    """Wan2.1, video."""

    family = Wan
    output = WanPipelineOutput
