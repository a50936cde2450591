"""Fréchet distances in the features of a vision model (FD) and of Inception (FID)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from scalewise.metrics.base import ImageFeatures, Metric, Statistic
from scalewise.metrics.clip import resize_shorter_side
from scalewise.metrics.extras import (
    Device,
    Extra,
    check_no_weights_missing,
    explain_load_errors,
    join_chunks,
    load_image_processor,
    load_pretrained,
    require_package,
    split_chunks,
)
from scalewise.metrics.frechet import distance_to

CHUNK = 32
FID_SIZE = 256
"""Side in pixels of Inception's input; the network itself resizes it to 299."""


class VisionFeatures:
    """Pooled features of a transformers vision model: DINOv2, SigLIP, CLIP's image encoder, ViT ..."""

    def __init__(self, model: nn.Module, processor: Any, *, class_token: bool = False) -> None:
        """Wrap a model; `class_token` uses the first token instead of the pooler output."""
        self.model: Any = model.eval().requires_grad_(False)
        self.processor = processor
        self.class_token = class_token

    @classmethod
    def load(cls, source: str, device: Device) -> VisionFeatures:
        """Load a model and its image processor from a folder or hub id; it computes in float32."""
        from transformers import AutoModel

        with explain_load_errors("a vision model", source):
            processor = load_image_processor(source)
            model, missing = load_pretrained(AutoModel, source)
        # Many ViTs, including DINO, are published without the pooling layer; use the class token instead.
        pooling = {name for name in missing if name.startswith("pooler.")}
        check_no_weights_missing(source, model, missing - pooling)
        return cls(model.to(device), processor, class_token=bool(pooling))

    @torch.no_grad()
    def extract(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return features [N, D] of uint8 images [N, H, W, 3]; see `FeatureExtractor`."""
        parts = []
        for chunk, _ in split_chunks(images, captions, CHUNK):
            pixels = self.processor([Image.fromarray(i) for i in chunk], return_tensors="pt").pixel_values
            parts.append(self._pooled(pixels.to(next(self.model.parameters()).device)))
        return {"fd": join_chunks(parts)}

    def extract_uncropped(self, pixels: Tensor) -> Tensor:
        """Return features [N, D] of pixels [N, 3, H, W] in [-1, 1], resized without cropping.

        The shorter side gets the model's input size, by bilinear resizing without antialiasing: VBench's
        preprocessing for DINO.
        """
        device = next(self.model.parameters()).device
        fitted = resize_shorter_side(
            pixels, int(self.model.config.image_size), mode="bilinear", antialias=False
        )
        mean, std = (
            torch.tensor(v).view(1, 3, 1, 1) for v in (self.processor.image_mean, self.processor.image_std)
        )
        fitted = ((fitted + 1) / 2 - mean) / std
        option = "interpolate_pos_encoding"  # needed for ViT; DINOv2 always interpolates
        options = {option: True} if option in signature(self.model.forward).parameters else {}
        return self._pooled(fitted.to(device), **options).float().cpu()

    def _pooled(self, pixels: Tensor, **options: bool) -> Tensor:
        if hasattr(self.model, "get_image_features"):
            output = self.model.get_image_features(pixel_values=pixels, **options)
            return output if isinstance(output, Tensor) else output.pooler_output
        output = self.model(pixel_values=pixels, **options)
        pooled = None if self.class_token else getattr(output, "pooler_output", None)
        return (output.last_hidden_state[:, 0] if pooled is None else pooled).flatten(1)


class Inception:
    """The 2,048 features of FID (arXiv 1706.08500), by torch-fidelity."""

    def __init__(self, network: nn.Module, device: Device) -> None:
        self.network, self.device = network.to(device), device

    @classmethod
    def load(cls, source: str, device: Device) -> Inception:
        """Load a safetensors file with torch-fidelity's weight names, or download it ("torch-fidelity").

        The downloaded file is a pickle; it is loaded with `weights_only=True`.
        """
        # Without --no-deps, pip may replace the installed torch to satisfy torch-fidelity's dependencies.
        with require_package("The metric fid", "pip install --no-deps torch-fidelity"):
            library = _inception_module()
        if source != "torch-fidelity" and not source.endswith(".safetensors"):
            raise ValueError(
                f"{source!r} must end in .safetensors; convert other weights once: "
                "safetensors.torch.save_file("
                "torch.load('weights-inception-2015-12-05-6726825d.pth', weights_only=True), "
                "'inception.safetensors')"
            )

        def weights(*_: Any, **__: Any) -> dict[str, Tensor]:
            if source == "torch-fidelity":
                return torch.hub.load_state_dict_from_url(
                    library.URL_INCEPTION_V3, weights_only=True, check_hash=True
                )
            return load_file(Path(source))

        with (
            explain_load_errors("FID's Inception", source),
            patch.object(library, "load_state_dict_from_url", weights),
        ):
            return cls(library.FeatureExtractorInceptionV3("inception", ["2048"]), device)

    @torch.no_grad()
    def extract(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return features [N, 2048] of uint8 images [N, H, W, 3]; see `FeatureExtractor` and `fid_square`."""
        parts = []
        for chunk, _ in split_chunks(images, captions, CHUNK):
            squares = np.stack([fid_square(image) for image in chunk])
            pixels = torch.from_numpy(squares).permute(0, 3, 1, 2).to(self.device)
            parts.append(self.network(pixels)[0])
        return {"fid": join_chunks(parts)}


def fid_square(image: np.ndarray) -> np.ndarray:
    """Preprocess an image for FID as the paper's authors do: uint8 [H, W, 3] to [256, 256, 3].

    The shorter side is resized to 256 with Pillow's LANCZOS filter and the center is cropped
    (`fid_score_in_memory.py` of github.com/yandex-research/swd, with torchvision's rounding). Inception's
    own resizing interpolates between 4 pixels at any size, which would cause aliasing in large images.
    """
    shorter = min(image.shape[:2])
    height, width = (FID_SIZE * side // shorter for side in image.shape[:2])
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
    top, left = (round((side - FID_SIZE) / 2) for side in (height, width))
    return np.asarray(resized.crop((left, top, left + FID_SIZE, top + FID_SIZE)))


def _inception_module() -> ModuleType:
    """Import only torch-fidelity's Inception module; raise ImportError if the package is not installed.

    The package's `__init__` imports torchvision, which Inception does not need. The module is therefore
    imported with an empty stand-in for the package.
    """
    package, name = "torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"
    if name in sys.modules:
        return sys.modules[name]
    spec = find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {package!r}")
    stand_in = ModuleType(package)
    stand_in.__path__ = list(spec.submodule_search_locations)
    sys.modules[package] = stand_in
    try:
        return importlib.import_module(name)
    finally:  # later imports of the package get the real one
        for imported in [m for m in sys.modules if m.partition(".")[0] == package]:
            del sys.modules[imported]


def _distance(features: ImageFeatures, name: str) -> Statistic | None:
    if name not in features.outputs or name not in features.real:
        return None
    return distance_to(features.outputs[name], features, features.real[name])


FD = Extra(
    name="fd", load=VisionFeatures.load, source="facebook/dinov2-base", real=True, frechet=True,
    metrics=(Metric(
        name="fd", title="FD", better="lower", digits=2, bounds=(0, float("inf")), rounds=200,
        statistic=lambda features: _distance(features, "fd"),
        about="Fréchet distance to real images in a vision model's features; compare only values of the same "
              "number of images",
    ),),
)  # fmt: skip

FID = Extra(
    name="fid", load=Inception.load, source="torch-fidelity", real=True, frechet=True,
    protocol="LANCZOS to 256, center",
    metrics=(Metric(
        name="fid", title="FID", better="lower", digits=2, bounds=(0, float("inf")), rounds=200,
        statistic=lambda features: _distance(features, "fid"),
        about="Fréchet distance to real images in Inception's features; compare only values of the same "
              "number of images",
    ),),
)  # fmt: skip
