"""Datasets on disk: latents, image folders, cached prompt embeddings and smaller scales."""

from __future__ import annotations

from scalewise.data.encode import PromptCache, encode_folder, open_sets
from scalewise.data.image_folder import (
    ImageEntry,
    Skipped,
    assign_buckets,
    bucket_sizes,
    load_pixels,
    scan_images,
)
from scalewise.data.latent_set import LatentSet, LatentSetWriter, sets_fingerprint
from scalewise.data.shards import DataError

__all__ = [
    "DataError",
    "ImageEntry",
    "LatentSet",
    "LatentSetWriter",
    "PromptCache",
    "Skipped",
    "assign_buckets",
    "bucket_sizes",
    "encode_folder",
    "load_pixels",
    "open_sets",
    "scan_images",
    "sets_fingerprint",
]
