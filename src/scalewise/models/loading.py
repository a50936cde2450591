"""Loading the components of a base from safetensors, with checks for missing and damaged files."""

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
    choose_variant,
    choose_variants,
    diffusers_class,
    find_weight_files,
    max_tokens,
    refuse_quantized,
    with_defaults,
)
from scalewise.models.intact import check_component
from scalewise.models.schedulers import refuse_inverted

_MISFIT = re.compile(
    r"because (\S+) expected shape torch\.Size\(\[(.*?)\]\), but got torch\.Size\(\[(.*?)\]\)"
)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Raise ModelError with the name of a part for errors within a `with` block."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        reason = first_line(error).rstrip(".")
        raise ModelError(f"Cannot load {what}: {reason}. Download the model again.") from error


def load_pipeline(
    family: Any, base: str, *, dtype: torch.dtype, parts: Sequence[Part], vae: str | None, variant: str | None
) -> tuple[Any, dict[str, Any], dict[str, Any], dict[str, tuple[str, str]]]:
    """Load the pipeline of a model family with the given parts, and check them.

    Returns the pipeline, the configurations of denoiser and VAE, and the library and class of all components.
    """
    names = family.parts()
    with loading(f"the model {base}"):
        found = family.components(base)
        variants = choose_variants(base, found.keys(), variant)
        family.check_files(base, found, parts, variants=variants, other_vae=vae is not None)
        left_out = [n for part in ALL_PARTS if part not in parts for n in names[part]]
        left_out += [n for n in family.text_names if n not in found]
        chosen: dict[str, Any] = dict.fromkeys(left_out)
        config = load_component_config(base, family.denoiser_name, found)
        own_vae = load_component_config(base, "vae", found)
        vae_config = load_vae_config(vae, own_vae) if vae else own_vae
        if "vae" in parts:
            kind, half = vae_class(vae_config), family.vae_dtype(vae_config, dtype)
            if vae:
                chosen["vae"] = load_vae(vae, kind, dtype=half)
            else:
                chosen["vae"] = load_component(base, "vae", kind, dtype=half, variant=variants["vae"])
        if "text" in parts:
            chosen |= load_text_encoders(base, found, family.text_names, dtype=dtype, variants=variants)
        if "denoiser" in parts:
            name = family.denoiser_name
            kind = diffusers_class(found, name, base)
            chosen[name] = load_component(base, name, kind, dtype=dtype, variant=variants[name])
        pipeline = family.pipeline_class.from_pretrained(base, dtype=dtype, use_safetensors=True, **chosen)
    refuse_inverted(pipeline.scheduler.config, base)
    check_complete(pipeline, base)
    refuse_non_finite(pipeline, base, vae=vae or base)
    check_tokenizers(pipeline, family.text_names, base)
    set_tokenizer_lengths(pipeline, family.text_names)
    return pipeline, config, vae_config, found


def load_component_config(base: str, name: str, components: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Load the configuration of denoiser or VAE with its defaults; ModelError if it is quantized."""
    config = AutoencoderKL.load_config(base, subfolder=name)
    refuse_quantized(config, name, base)
    config = {"_class_name": components[name][1], **config}
    return with_defaults(
        config, vae_class(config) if name == "vae" else diffusers_class(components, name, base)
    )


def load_vae_config(vae: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """Load the configuration of another VAE; raise ModelError if its latents differ from those of `own`."""
    find_vae_config(vae, weights=False)
    with loading(f"the VAE {vae}"):
        config = AutoencoderKL.load_config(vae)
        refuse_quantized(config, "VAE", vae)
        config = with_defaults(config, vae_class(config))
    check_vae(config, own, vae)
    return config


def find_vae_config(vae: str, *, weights: bool) -> Path:
    """Return the path of the config.json of a VAE in a folder or on the hub; raise ModelError if it is
    missing.

    `weights`: whether a folder must contain weights.
    """
    remedy = "Set model.vae to the folder of a VAE with a config.json, or to the hub id of a VAE."
    if Path(vae).is_dir():
        if not (Path(vae) / "config.json").exists():
            raise ModelError(f"The VAE {vae} has no config.json. {remedy}")
        check_component(Path(vae), f"The VAE {vae}", kind=("diffusers", "AutoencoderKL"), weights=weights)
        return Path(vae) / "config.json"
    if vae.startswith((".", "/")) or vae.count("/") > 1:
        raise ModelError(f"The VAE {vae} does not exist. {remedy}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(vae, "config.json"))
    except Exception as error:
        raise ModelError(
            f"Cannot find the VAE {vae!r}: there is no such folder, and the hub answered: "
            f"{first_line(error)} {remedy}"
        ) from error


def load_component(base: str, name: str, kind: Any, *, dtype: torch.dtype, variant: str | None) -> Any:
    """Load a diffusers component from its folder in a base, or from `base` itself if `name` is empty."""
    try:
        return kind.from_pretrained(
            base, subfolder=name or None, torch_dtype=dtype, use_safetensors=True, variant=variant
        )
    except (ValueError, RuntimeError) as error:
        if found := _MISFIT.search(str(error)):
            raise ModelError(
                f"The {name or 'VAE'} of {base} has weights that do not match its config.json: {found[1]} "
                f"has the shape [{found[3]}], but the configuration gives [{found[2]}]. Download the model "
                "again."
            ) from error
        raise


def load_vae(vae: str, kind: Any, *, dtype: torch.dtype) -> Any:
    """Load a VAE from its own folder or hub id; it must have one variant of weights or a default one."""
    find_vae_config(vae, weights=True)
    with loading(f"the VAE {vae}"):
        return load_component(
            vae, "", kind, dtype=dtype, variant=choose_variant(find_weight_files(vae), "", None)
        )


def load_text_encoders(
    base: str,
    components: Mapping[str, tuple[str, str]],
    names: Sequence[str],
    *,
    dtype: torch.dtype,
    variants: Mapping[str, str | None],
) -> dict[str, Any]:
    """Load the text encoders of a base; raise ModelError for missing or mismatched weights."""
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
                f"The {name} of {base} has {len(misfits)} weights that do not match its config.json, for "
                f"example {misfits[0]}. Download the model again."
            )
        missing = sorted(report["missing_keys"])
        if missing:
            raise _missing_weights(name, base, missing)
    return found


def check_complete(pipeline: Any, base: str) -> None:
    """Raise ModelError for modules with missing weights, which diffusers leaves on the meta device."""
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            empty = [key for key, value in component.named_parameters() if value.is_meta]
            if empty:
                raise _missing_weights(name, base, empty)


def _missing_weights(name: str, base: str, keys: Sequence[str]) -> ModelError:
    return ModelError(
        f"{len(keys)} weights of the {name} of {base} are missing, for example {keys[0]}. Download the model "
        "again."
    )


def refuse_non_finite(pipeline: Any, base: str, *, vae: str) -> None:
    """Raise ModelError for modules with weights that are NaN or infinite in the dtype of loading.

    `vae`: folder or hub id of the VAE, for the message.
    """
    for name, module in pipeline.components.items():
        if not isinstance(module, nn.Module):
            continue
        weights = dict[str, Any](module.named_parameters()) | dict(module.named_buffers())
        if broken := non_finite(weights):
            kind = str(weights[broken[0]].dtype).removeprefix("torch.")
            source = vae if name == "vae" else base
            raise ModelError(
                f"The {name} of {source} has NaN or infinity in {len(broken)} of its {len(weights)} weights "
                f"(as {kind}), for example {broken[0]}. Download the model again, or set "
                "model.dtype=bfloat16 if the weights overflow in float16."
            )


def check_tokenizers(pipeline: Any, names: Sequence[str], base: str) -> None:
    """Raise ModelError for a tokenizer with missing files, which transformers loads with few tokens."""
    for name in names:
        tokenizer = getattr(pipeline, name, None)
        encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"), None)
        if not name.startswith("tokenizer") or tokenizer is None or encoder is None:
            continue
        is_missing = Path(base).is_dir() and not (Path(base) / name).is_dir()
        # Some text encoders have a few more embeddings than the tokenizer has tokens.
        if is_missing or len(tokenizer) < encoder.config.vocab_size / 2:
            raise ModelError(
                f"The {name} of {base} has a vocabulary of {len(tokenizer)} tokens, but its text encoder has "
                f"{encoder.config.vocab_size}: files are missing. Download the model again."
            )


def set_tokenizer_lengths(pipeline: Any, names: Sequence[str]) -> None:
    """Set the maximum length of tokenizers without one to the length of their text encoders."""
    for name in names:
        tokenizer = getattr(pipeline, name, None)
        encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"), None)
        if name.startswith("tokenizer") and tokenizer is not None and encoder is not None:
            tokenizer.model_max_length = max_tokens(tokenizer.model_max_length, encoder.config)
    if hasattr(pipeline, "tokenizer_max_length") and pipeline.tokenizer is not None:
        pipeline.tokenizer_max_length = pipeline.tokenizer.model_max_length  # set by diffusers before


def check_vae(other: Mapping[str, Any], own: Mapping[str, Any], name: str) -> None:
    """Raise ModelError if another VAE has a different number of channels or frames than `own`."""
    for key in ("latent_channels", "z_dim", "scale_factor_temporal"):
        if other.get(key) != own.get(key):
            raise ModelError(
                f"The VAE {name} has {key}={other.get(key)}, but the VAE of the base has "
                f"{key}={own.get(key)}, so their latents are incompatible. Use a VAE that was made for this "
                "base."
            )


def spatial_factor(vae_config: Mapping[str, Any]) -> int:
    """Return the side length of a latent cell in pixels."""
    if "scale_factor_spatial" in vae_config:
        return int(vae_config["scale_factor_spatial"])
    levels = vae_config.get("encoder_block_out_channels") or vae_config["block_out_channels"]
    return 2 ** (len(levels) - 1)


def vae_class(vae_config: Mapping[str, Any]) -> Any:
    """Return the diffusers class in the configuration of a VAE; ModelError if it is not a VAE."""
    import diffusers

    name = str(vae_config.get("_class_name", ""))
    if not name.startswith("Autoencoder") or not hasattr(diffusers, name):
        raise ModelError(f"{name or 'A class without a name'} is not a VAE of diffusers; use another VAE.")
    return getattr(diffusers, name)
