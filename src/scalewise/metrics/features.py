"""Frechet distances in the features of any vision model (FD), and of FID's Inception."""

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

from scalewise.metrics.base import Metric, Seen, Statistic
from scalewise.metrics.clip import shorter_side
from scalewise.metrics.extras import (
    Device,
    Extra,
    image_processor,
    in_chunks,
    joined,
    loading,
    needing,
    pretrained,
    refuse_missing,
)
from scalewise.metrics.frechet import distance_to

CHUNK = 32
FID_SIZE = 256
"""Pixels of the square that Inception is shown; its network enlarges them to 299."""


class VisionFeatures:
    """The pooled features of a transformers model: DINOv2, SigLIP, CLIP's image tower, ViT ..."""

    def __init__(self, model: nn.Module, processor: Any, *, class_token: bool = False) -> None:
        """`class_token`: take the first token, not the model's own pooling."""
        self.model: Any = model.eval().requires_grad_(False)
        self.processor = processor
        self.class_token = class_token

    @classmethod
    def load(cls, source: str, device: Device) -> VisionFeatures:
        """Read a model with its image processor, from a folder or the hub; computes in float32."""
        from transformers import AutoModel

        with loading("a vision model", source):
            processor = image_processor(source)
            model, missing = pretrained(AutoModel, source)
        # Many ViTs (DINO's among them) are published without the pooling layer, which would stay random.
        pooling = {name for name in missing if name.startswith("pooler.")}
        refuse_missing(source, model, missing - pooling)
        return cls(model.to(device), processor, class_token=bool(pooling))

    @torch.no_grad()
    def look(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """Features [N, D] of images; see `Examiner`."""
        parts = []
        for chunk, _ in in_chunks(images, captions, CHUNK):
            pixels = self.processor([Image.fromarray(i) for i in chunk], return_tensors="pt").pixel_values
            parts.append(self._pooled(pixels.to(next(self.model.parameters()).device)))
        return {"fd": joined(parts)}

    def whole(self, pixels: Tensor) -> Tensor:
        """Features [N, D] of pixels [N, 3, H, W] in [-1, 1], the shorter side brought to the model's and
        nothing cut off, by bilinear resizing as it comes: DINO as VBench asks it.
        """
        device = next(self.model.parameters()).device
        fitted = shorter_side(pixels, int(self.model.config.image_size), mode="bilinear", antialias=False)
        mean, std = (
            torch.tensor(v).view(1, 3, 1, 1) for v in (self.processor.image_mean, self.processor.image_std)
        )
        fitted = ((fitted + 1) / 2 - mean) / std
        asked = "interpolate_pos_encoding"  # by ViT; DINOv2 does so by itself
        options = {asked: True} if asked in signature(self.model.forward).parameters else {}
        return self._pooled(fitted.to(device), **options).float().cpu()

    def _pooled(self, pixels: Tensor, **options: bool) -> Tensor:
        if hasattr(self.model, "get_image_features"):
            found = self.model.get_image_features(pixel_values=pixels, **options)
            return found if isinstance(found, Tensor) else found.pooler_output
        found = self.model(pixel_values=pixels, **options)
        pooled = None if self.class_token else getattr(found, "pooler_output", None)
        return (found.last_hidden_state[:, 0] if pooled is None else pooled).flatten(1)


class Inception:
    """The 2,048 features of FID (arXiv 1706.08500), by torch-fidelity."""

    def __init__(self, network: nn.Module, device: Device) -> None:
        self.network, self.device = network.to(device), device

    @classmethod
    def load(cls, source: str, device: Device) -> Inception:
        """Read a safetensors file with torch-fidelity's names, or have "torch-fidelity" fetch its weights.

        The library unpickles what it fetches; here only its tensors are let through.
        """
        # Without --no-deps, pip may replace the installed torch by the one that its dependencies want.
        with needing("The metric fid", "pip install --no-deps torch-fidelity"):
            library = _inception_module()
        if source != "torch-fidelity" and not source.endswith(".safetensors"):
            raise ValueError(
                f"{source!r} is no safetensors file; convert other weights once: safetensors.torch.save_file("
                "torch.load('weights-inception-2015-12-05-6726825d.pth', weights_only=True), "
                "'inception.safetensors')"
            )

        def weights(*_: Any, **__: Any) -> dict[str, Tensor]:
            if source == "torch-fidelity":
                return torch.hub.load_state_dict_from_url(
                    library.URL_INCEPTION_V3, weights_only=True, check_hash=True
                )
            return load_file(Path(source))

        with loading("FID's Inception", source), patch.object(library, "load_state_dict_from_url", weights):
            return cls(library.FeatureExtractorInceptionV3("inception", ["2048"]), device)

    @torch.no_grad()
    def look(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """Features [N, 2048] of images; see `Examiner` and `fid_square`."""
        parts = []
        for chunk, _ in in_chunks(images, captions, CHUNK):
            squares = np.stack([fid_square(image) for image in chunk])
            pixels = torch.from_numpy(squares).permute(0, 3, 1, 2).to(self.device)
            parts.append(self.network(pixels)[0])
        return {"fid": joined(parts)}


def fid_square(image: np.ndarray) -> np.ndarray:
    """Prepare an image for FID: bytes [H, W, 3] to [256, 256, 3], by the protocol of the paper's authors.

    The shorter side is brought to 256 by Pillow's LANCZOS filter and the center is cropped
    (`fid_score_in_memory.py` of github.com/yandex-research/swd, torchvision's rounding). Without that,
    Inception's own resizing, which takes 4 pixels of each neighborhood whatever the size, aliases what is
    finer than 299 pixels show.
    """
    shorter = min(image.shape[:2])
    height, width = (FID_SIZE * side // shorter for side in image.shape[:2])
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
    top, left = (round((side - FID_SIZE) / 2) for side in (height, width))
    return np.asarray(resized.crop((left, top, left + FID_SIZE, top + FID_SIZE)))


def _inception_module() -> ModuleType:
    """Import torch-fidelity's Inception alone; raises ImportError without the package.

    The package's `__init__` imports torchvision for its other networks. Inception needs none of it, so the
    file is imported below a stand-in for the package.
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
    finally:  # so that whoever imports the package gets it whole
        for imported in [m for m in sys.modules if m.partition(".")[0] == package]:
            del sys.modules[imported]


def _distance(name: str, seen: Seen) -> Statistic | None:
    if name not in seen.looks or name not in seen.real:
        return None
    return distance_to(seen.looks[name], seen, seen.real[name])


FD = Extra(
    name="fd", load=VisionFeatures.load, source="facebook/dinov2-base", real=True, frechet=True,
    metrics=(Metric(
        name="fd", title="FD", better="lower", digits=2, bounds=(0, float("inf")), rounds=200,
        statistic=lambda seen: _distance("fd", seen),
        about="Fréchet distance to real pictures in a vision model's features; only figures of equally many "
              "pictures compare",
    ),),
)  # fmt: skip

FID = Extra(
    name="fid", load=Inception.load, source="torch-fidelity", real=True, frechet=True,
    protocol="LANCZOS to 256, center",
    metrics=(Metric(
        name="fid", title="FID", better="lower", digits=2, bounds=(0, float("inf")), rounds=200,
        statistic=lambda seen: _distance("fid", seen),
        about="Fréchet distance to real pictures in Inception's features; only figures of equally many "
              "pictures compare",
    ),),
)  # fmt: skip
