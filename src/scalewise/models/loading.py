"""Components of a base, loaded from safetensors; what is incomplete or damaged is refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from torch import nn

from scalewise.common.errors import ModelError, first_line
from scalewise.common.finite import non_finite
from scalewise.models.folder import (
    ALL_PARTS,
    Part,
    diffusers_class,
    refuse_quantized,
    tokens_read,
    variant_of,
    variants_of,
    weight_names,
    with_defaults,
)
from scalewise.models.intact import check_component
from scalewise.models.schedulers import refuse_inverted

_MISFIT = re.compile(
    r"because (\S+) expected shape torch\.Size\(\[(.*?)\]\), but got torch\.Size\(\[(.*?)\]\)"
)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn what goes wrong while a part is found and read into a ModelError that names it."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        said = first_line(error).rstrip(".")
        raise ModelError(f"Cannot load {what}: {said}. Fetch the model again.") from error


def load_pipeline(
    family: Any, base: str, *, dtype: torch.dtype, parts: Sequence[Part], vae: str | None, variant: str | None
) -> tuple[Any, dict[str, Any], dict[str, Any], dict[str, tuple[str, str]]]:
    """Load a family's pipeline with some of its parts, all checked.

    Returns it with the configurations of its denoiser and VAE, and the base's components.
    """
    names = family.parts()
    with loading(f"the model {base}"):
        found = family.components(base)
        variants = variants_of(base, found.keys(), variant)
        family.check_files(base, found, parts, variants=variants, other_vae=vae is not None)
        left_out = [n for part in ALL_PARTS if part not in parts for n in names[part]]
        left_out += [n for n in family.text_names if n not in found]
        chosen: dict[str, Any] = dict.fromkeys(left_out)
        config = component_config(base, family.denoiser_name, found)
        own_vae = component_config(base, "vae", found)
        vae_config = autoencoder_config(vae, own_vae) if vae else own_vae
        if "vae" in parts:
            kind, half = vae_class_of(vae_config), family.vae_dtype(vae_config, dtype)
            if vae:
                chosen["vae"] = other_autoencoder(vae, kind, dtype=half)
            else:
                chosen["vae"] = load_component(base, "vae", kind, dtype=half, variant=variants["vae"])
        if "text" in parts:
            chosen |= text_encoders(base, found, family.text_names, dtype=dtype, variants=variants)
        if "denoiser" in parts:
            name = family.denoiser_name
            kind = diffusers_class(found, name, base)
            chosen[name] = load_component(base, name, kind, dtype=dtype, variant=variants[name])
        pipeline = family.pipeline_class.from_pretrained(base, dtype=dtype, use_safetensors=True, **chosen)
    refuse_inverted(pipeline.scheduler.config, base)
    check_complete(pipeline, base)
    refuse_non_finite(pipeline, base, vae=vae or base)
    check_tokenizers(pipeline, family.text_names, base)
    settle_lengths(pipeline, family.text_names)
    return pipeline, config, vae_config, found


def component_config(base: str, name: str, components: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """The configuration of a base's denoiser or VAE with its class's defaults; fewer bits are refused."""
    config = AutoencoderKL.load_config(base, subfolder=name)
    refuse_quantized(config, name, base)
    named = {"_class_name": components[name][1], **config}
    return with_defaults(
        named, vae_class_of(named) if name == "vae" else diffusers_class(components, name, base)
    )


def autoencoder_config(vae: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of another autoencoder than the base's `own`; refused if its latents are others."""
    find_autoencoder(vae, weights=False)
    with loading(f"the autoencoder {vae}"):
        config = AutoencoderKL.load_config(vae)
        refuse_quantized(config, "autoencoder", vae)
        found = with_defaults(config, vae_class_of(config))
    check_vae(found, own, vae)
    return found


def find_autoencoder(vae: str, *, weights: bool) -> Path:
    """The config.json of an autoencoder; ModelError with the remedy if there is none on disk or on the hub.

    `weights`: whether a folder has to hold them.
    """
    remedy = "Set model.vae to the folder of an autoencoder, which has a config.json, or to a hub id of one."
    if Path(vae).is_dir():
        if not (Path(vae) / "config.json").exists():
            raise ModelError(f"The autoencoder {vae} has no config.json. {remedy}")
        check_component(
            Path(vae), f"The autoencoder {vae}", kind=("diffusers", "AutoencoderKL"), weights=weights
        )
        return Path(vae) / "config.json"
    if vae.startswith((".", "/")) or vae.count("/") > 1:
        raise ModelError(f"There is no autoencoder {vae}. {remedy}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(vae, "config.json"))
    except Exception as error:
        raise ModelError(
            f"Cannot find the autoencoder {vae!r}: it is no folder here, and the hub answered: "
            f"{first_line(error)} {remedy}"
        ) from error


def load_component(base: str, name: str, kind: Any, *, dtype: torch.dtype, variant: str | None) -> Any:
    """Load a component of diffusers from its folder in a base, or from `base` itself if `name` is ""."""
    try:
        return kind.from_pretrained(
            base, subfolder=name or None, torch_dtype=dtype, use_safetensors=True, variant=variant
        )
    except (ValueError, RuntimeError) as error:
        if found := _MISFIT.search(str(error)):
            raise ModelError(
                f"The {name or 'autoencoder'} of {base} has weights that do not fit its config.json: "
                f"{found[1]} has the shape [{found[3]}] where the configuration makes it [{found[2]}]. Fetch "
                "the model again."
            ) from error
        raise


def other_autoencoder(vae: str, kind: Any, *, dtype: torch.dtype) -> Any:
    """Load an autoencoder from a folder or hub id of its own, in the only variant that it has."""
    find_autoencoder(vae, weights=True)
    with loading(f"the autoencoder {vae}"):
        return load_component(vae, "", kind, dtype=dtype, variant=variant_of(weight_names(vae), "", None))


def text_encoders(
    base: str,
    components: Mapping[str, tuple[str, str]],
    names: Sequence[str],
    *,
    dtype: torch.dtype,
    variants: Mapping[str, str | None],
) -> dict[str, Any]:
    """Load a base's text encoders; weights that its files lack are an error, not drawn at random."""
    found = {}
    for name in names:
        library, kind = components.get(name, ("", ""))
        if library != "transformers" or not name.startswith("text_encoder"):
            continue
        refuse_quantized(AutoencoderKL.load_config(base, subfolder=name), name, base)
        found[name], report = getattr(transformers, kind).from_pretrained(
            base, subfolder=name, dtype=dtype, use_safetensors=True, output_loading_info=True,
            variant=variants[name], ignore_mismatched_sizes=True,
        )  # fmt: skip
        if misfits := sorted(str(key[0]) for key in report["mismatched_keys"]):
            raise ModelError(
                f"The {name} of {base} has {len(misfits)} weights that do not fit its config.json, for "
                f"example {misfits[0]}. Fetch the model again."
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


def refuse_non_finite(pipeline: Any, base: str, *, vae: str) -> None:
    """Refuse modules with weights that are NaN or infinite in the type they were loaded in.

    `vae` is where the autoencoder comes from.
    """
    for name, module in pipeline.components.items():
        if not isinstance(module, nn.Module):
            continue
        weights = dict[str, Any](module.named_parameters()) | dict(module.named_buffers())
        if broken := non_finite(weights):
            kind = str(weights[broken[0]].dtype).removeprefix("torch.")
            place = vae if name == "vae" else base
            raise ModelError(
                f"The {name} of {place} has NaN or infinity in {len(broken)} of its {len(weights)} weights "
                f"(as {kind}), for example {broken[0]}. Fetch the model again; if float16 cannot hold it, "
                "set model.dtype=bfloat16."
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


def settle_lengths(pipeline: Any, names: Sequence[str]) -> None:
    """Give tokenizers without a length of their own the one that their text encoders read."""
    for name in names:
        tokenizer = getattr(pipeline, name, None)
        encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"), None)
        if name.startswith("tokenizer") and tokenizer is not None and encoder is not None:
            tokenizer.model_max_length = tokens_read(tokenizer.model_max_length, encoder.config)
    if hasattr(pipeline, "tokenizer_max_length") and pipeline.tokenizer is not None:
        pipeline.tokenizer_max_length = pipeline.tokenizer.model_max_length  # taken before


def check_vae(other: Mapping[str, Any], own: Mapping[str, Any], place: str) -> None:
    """Refuse an autoencoder whose latents are not the base's own: other channels, or pictures for video."""
    for what in ("latent_channels", "z_dim", "scale_factor_temporal"):
        if other.get(what) != own.get(what):
            raise ModelError(
                f"The VAE {place} has {what} {other.get(what)} and the base's has {own.get(what)}, so its "
                "latents are others. Give one that was made for this base."
            )


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
