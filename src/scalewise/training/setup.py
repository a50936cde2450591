"""From a recipe to what runs it: model, data, prompts, backbone, trainer, each loaded while it is needed."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scalewise.common import console, distributed
from scalewise.common.contents import part_fingerprint
from scalewise.common.paths import expand_home
from scalewise.common.progress import Progress
from scalewise.config.recipe import Recipe, RecipeError
from scalewise.data import LatentSet, PromptCache, encode_folder
from scalewise.data.batches import Batches
from scalewise.data.image_folder import list_files
from scalewise.data.synthetic import contents_of
from scalewise.method.backbone import Backbone
from scalewise.method.scales import Scale
from scalewise.models import ALL_PARTS, Part, PipelineAdapter, family_of, load_model
from scalewise.models.offloading import offload
from scalewise.models.quantization import quantize
from scalewise.training.trainer import Trainer


def cache_folder() -> Path:
    """Where prompt embeddings and encoded image folders are kept: $SCALEWISE_CACHE or ~/.cache/scalewise."""
    return Path(expand_home(os.environ.get("SCALEWISE_CACHE", "~/.cache/scalewise")))


def load(recipe: Recipe, parts: Iterable[Part], *, training: bool = False) -> PipelineAdapter:
    """Load parts of the recipe's teacher onto this process's device, in its bits and offloaded as it says.

    `training` keeps the denoiser on the device: it runs forward and backward there in every update.
    """
    base, wanted = recipe.model.folder, tuple(parts)
    model = load_model(
        base,
        dtype=getattr(torch, recipe.model.dtype),
        parts=wanted,
        max_sequence_length=recipe.model.max_sequence_length,
        vae=recipe.model.vae,
        variant=recipe.model.variant,
        family=recipe.model.family,
    )
    if recipe.model.embedded_guidance is not None:
        model.set_guidance(recipe.model.embedded_guidance)
    if "denoiser" in wanted:
        quantize(model, recipe.model.quantize, distributed.device())
    few = "denoiser" in wanted and recipe.model.quantize != "none"
    if not training and offload(model, recipe.model.offload, distributed.device(), denoiser_stays=few):
        return model
    if "text" in wanted and recipe.model.offload_text:
        model.offload_text(distributed.device())
    return model.to(distributed.device())


def check(recipe: Recipe, model: PipelineAdapter) -> None:
    """Refuse a recipe that does not fit the model: scales, feature block."""
    schedule = recipe.schedule.build()
    model.check_schedule(schedule)
    if schedule[0].t < 1000:
        warnings.warn(
            f"The schedule begins at t = {schedule[0].t:g}, but sampling starts from pure noise, t = 1000; "
            "begin with that.",
            stacklevel=2,
        )
    model.block(recipe.loss.feature_block)


def fingerprint(recipe: Recipe) -> str:
    """Key of everything that decides a prompt's embedding: what the base's text files hold, wherever they
    lie, family, type and sequence length; "" for a base of the hub that is not downloaded.
    """
    base = recipe.model.folder
    files = part_fingerprint(base, "text_encoder", "tokenizer", variant=recipe.model.variant)
    if not files:
        return ""
    family = family_of(base, recipe.model.family)
    parts = [files, family.family, recipe.model.dtype, str(recipe.model.max_sequence_length)]
    if family.optional_texts:
        there = family.components(base)
        parts += [f"no {name}" for name in family.optional_texts if name not in there]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def vae_key(recipe: Recipe) -> str:
    """Key of the autoencoder by what its files hold, wherever they lie, and its type; load it first."""
    return f"{contents_of(recipe)['vae']} {recipe.model.dtype}"


@dataclass
class Data:
    """What training reads: latents and prompt embeddings; VAE and text encoders are not needed any more."""

    sets: list[LatentSet]
    prompts: PromptCache


def prepare_data(recipe: Recipe, progress: Progress, *, extra_prompts: Iterable[str] = ()) -> Data:
    """Open or make the latent sets, and embed every caption once."""
    path = recipe.data.folder
    if (path / "set.json").exists() or not path.is_dir():
        sets = [LatentSet.open(path)]
        if not sets[0].header.is_made_by(recipe.model.base, contents_of(recipe)):
            warnings.warn(
                f"The set {path} was made by {sets[0].header.base}, but the teacher to distil is "
                f"{recipe.model.base}; its own samples are what the method asks for (`scalewise generate`).",
                stacklevel=2,
            )
        check_scales(recipe, sets[0])
    else:
        sets = _encode_images(recipe, path, progress)
    captions = {c for s in sets for c in s.unique_captions()} | set(extra_prompts)
    captions |= {recipe.teacher.negative_prompt}
    return Data(sets, prompt_cache(recipe, sorted(captions), progress))


def check_scales(recipe: Recipe, data: LatentSet) -> None:
    """Refuse a set without the recipe's scales, before anything is computed for it."""
    schedule = recipe.schedule.build()
    data.require([schedule.full] if recipe.data.downscale == "latent" else schedule.scales)


def prompt_cache(recipe: Recipe, captions: list[str], progress: Progress) -> PromptCache:
    """Embeddings of captions, made once per text encoders and kept."""
    if not fingerprint(recipe):
        load(recipe, ["text"])  # a first use: downloads what the key is made of
    key = fingerprint(recipe)
    folder = cache_folder() / "prompts" / key
    cache = PromptCache.open(folder, fingerprint=key)
    missing = cache.missing(captions)
    if not missing:
        return cache
    with progress("encoding prompts", len(missing)) as done:
        return PromptCache.build(
            lambda: load(recipe, ["text"]),
            captions,
            folder,
            fingerprint=key,
            done=done,
        )


def _encode_images(recipe: Recipe, folder: Path, progress: Progress) -> list[LatentSet]:
    """Latents of an image folder at every scale of the recipe's schedule, made once and kept."""
    schedule = recipe.schedule.build()
    model = load(recipe, ["vae"])
    if model.video:
        raise RecipeError(
            f"{folder} is a folder of pictures, but {recipe.model.base} makes videos; train it on a "
            "synthetic set (`scalewise generate`)."
        )

    def scales_for(full: Scale) -> list[Scale]:
        return sorted(set(schedule.for_size(full, model.patch).scales))

    key = vae_key(recipe)
    least = recipe.train.batch * distributed.world()
    # One cache for each way to encode a folder, so that two runs which differ in it do not undo each other's.
    ways = [folder.resolve(), schedule, recipe.data.shape, recipe.data.caption_from_name, key]
    if recipe.data.shape == "buckets":
        ways.append(least)
    name = hashlib.sha256(" ".join(map(str, ways)).encode()).hexdigest()[:16]
    with progress("encoding images", len(list_files(folder).images)) as done:
        return encode_folder(
            model,
            folder,
            cache_folder() / "images" / name,
            scales_for=scales_for,
            full=schedule.full,
            vae_key=key,
            mode=recipe.data.shape,
            least=least,
            caption_from_name=recipe.data.caption_from_name,
            done=done,
            say=console.print_note,
        )


def build_backbone(recipe: Recipe, model: PipelineAdapter) -> Backbone:
    """The frozen base with the roles that the recipe's loss trains."""
    roles = ["student", "fake"] if recipe.loss.needs_fake else ["student"]
    return Backbone(
        model,
        roles,
        rank=recipe.lora.rank,
        alpha=recipe.lora.alpha,
        targets=recipe.lora.targets,
        precision=recipe.train.precision,
        seed=recipe.train.seed,
    )


def training_backbone(recipe: Recipe, data: Data) -> Backbone:
    """The frozen base with its roles, checked against the recipe and the data."""
    if recipe.model.dtype == "float16":
        raise RecipeError(
            "model.dtype=float16 is for sampling: in training, gradients below 6e-8 would be lost in it. Set "
            "model.dtype=bfloat16, or float32 on a device without it."
        )
    model = load(recipe, ["denoiser"], training=True)
    check(recipe, model)
    for one in data.sets:
        if one.header.channels != model.channels:
            raise RecipeError(
                f"The set {recipe.data.path} holds latents of {one.header.channels} channels (of "
                f"{one.header.base}), but {recipe.model.base} has {model.channels}; make one with `scalewise "
                "generate`."
            )
    return build_backbone(recipe, model)


def build_trainer(recipe: Recipe, data: Data, out: Path) -> Trainer:
    """Everything that `Trainer.fit` needs; holds the denoiser only."""
    backbone = training_backbone(recipe, data)
    return Trainer(recipe, backbone, batches_for(recipe, data, backbone), out)


def batches_for(recipe: Recipe, data: Data, backbone: Backbone) -> Batches:
    """What this process's updates see."""
    return Batches(
        data.sets,
        recipe.schedule.build(),
        data.prompts,
        batch=recipe.train.batch,
        seed=recipe.train.seed,
        downscale=recipe.data.downscale,
        step_choice=recipe.train.step_choice,
        patch=backbone.model.patch,
        rank=distributed.rank(),
        world=distributed.world(),
        device=backbone.device,
        negative=recipe.teacher.negative_prompt,
    )


def teacher(recipe: Recipe) -> PipelineAdapter:
    """The whole teacher, to generate with."""
    return load(recipe, ALL_PARTS)


def dry_run(recipe: Recipe) -> dict[str, Any]:
    """What a run would build, without data: tokens, trainable parameters, memory held."""
    model = load(recipe, ["denoiser"], training=True)
    check(recipe, model)
    backbone = build_backbone(recipe, model)
    schedule = recipe.schedule.build()
    held = sum(p.numel() * p.element_size() for p in model.denoiser.parameters())
    trainable = {r: sum(p.numel() for p in backbone.parameters(r).values()) for r in backbone.roles.names}
    return {
        "steps": [(step.t, str(step.scale), model.token_count(step.scale)) for step in schedule],
        "tokens": schedule.tokens(model.patch),
        "full_tokens": schedule.at_full_scale().tokens(model.patch),
        "base_parameters": sum(p.numel() for n, p in model.denoiser.named_parameters() if "lora_" not in n),
        "trainable": trainable,
        # gradient and two AdamW moments, in float32
        "megabytes": {"weights": held / 1e6, "gradients and optimizer": sum(trainable.values()) * 12 / 1e6},
    }
