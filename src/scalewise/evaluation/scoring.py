"""Load the scorer and metrics for generated images, and the reference images they are compared with."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scalewise import mini
from scalewise.common import distributed
from scalewise.common.checkpoint import write_atomically
from scalewise.common.images import middle_frames, to_bytes
from scalewise.common.progress import Progress, silent
from scalewise.config.recipe import Recipe, RecipeError
from scalewise.data.image_folder import ImageEntry, load_pixels, scan_images
from scalewise.data.shards import exclusive
from scalewise.evaluation.samplers import Prompts
from scalewise.metrics import EXTRAS, METRICS, ClipScorer, ImageFeatures
from scalewise.metrics.base import FeatureExtractor, Gaussian
from scalewise.metrics.extras import Extra, parse_metric, source_stamps
from scalewise.metrics.intervals import MIN_SAMPLES
from scalewise.training import setup

CHUNK = 32
SCORER, SPECTRUM = "scorer", "spectrum"


@dataclass(frozen=True)
class ScoringOptions:
    """The scorer, further metrics and reference images of a comparison."""

    scorer: str | None = None
    """Folder or hub id of a CLIP model; None = the mini's own scorer, and no scorer for other bases."""
    metrics: tuple[str, ...] = ()
    """Further metrics, as NAME or NAME=SOURCE."""
    reference: Path | None = None
    """A folder of real images; None = the reference features shipped with the mini."""


@dataclass(frozen=True)
class Scorers:
    """The loaded scorer and metrics, with features of reference images and further captions."""

    scorer: ClipScorer | None
    reference: Tensor | None = None
    """The scorer's features of real images [M, D]; None = no Fréchet distance."""
    pool: Sequence[str] = ()
    """Further captions for prompt match, which needs 50 distinct captions including the prompts."""
    examiners: tuple[tuple[Extra, FeatureExtractor], ...] = ()
    real: dict[str, Gaussian] | None = None
    """Feature statistics of real images, for metrics that need them."""
    is_mini_default: bool = False
    """Whether these are the mini's own scorer and reference, for which scores of real images are
    available.
    """

    def warn_of_few(self, generated: int) -> None:
        """Warn if there are too few generated or real images for a covariance of full rank."""
        shapes = {} if self.reference is None else {"the scorer": self.reference.shape}
        for name in (extra.name for extra, _ in self.examiners if extra.frechet):
            if real := (self.real or {}).get(name):
                shapes[name] = torch.Size((real.count, len(real.mean)))
        for name, (real_count, width) in shapes.items():
            for count, which in ((real_count, "real"), (generated, "generated")):
                if count <= width:
                    warnings.warn(
                        f"{count:,} {which} images are not more than the {width:,} features of {name}: its "
                        "Fréchet distances are biased upwards; compare them only with distances for the same "
                        "number of images.",
                        stacklevel=2,
                    )

    def score(self, images: np.ndarray, prompts: Prompts) -> ImageFeatures:
        """Score images (uint8 [N, H, W, 3], videos [N, T, H, W, 3]) generated for `prompts`."""
        return self.combine(self.score_images(images, prompts.captions), prompts)

    def score_images(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return values [N] or features [N, D] of each image by metric; the scorer's features under SCORER.

        `images`: uint8 [N, H, W, 3], or videos [N, T, H, W, 3]. For videos, image metrics use the middle
        frame.
        """
        scores: dict[str, Tensor] = {}
        for extra, examiner in self.examiners:
            scores |= examiner.extract(images if extra.videos else middle_frames(images), captions)
        if self.scorer:
            scores[SCORER] = self.scorer.embed_images(middle_frames(images))
        return scores

    def combine(self, scores: Mapping[str, Tensor], prompts: Prompts) -> ImageFeatures:
        """Combine the result of `score_images` with the embeddings of captions and the reference."""
        others = {name: rows for name, rows in scores.items() if name != SCORER}
        captions = list(dict.fromkeys([*prompts.unique, *self.pool]))
        texts = self.scorer.embed_texts(captions) if self.scorer else None
        return ImageFeatures(
            scores.get(SCORER), prompts.prompt_index, texts, self.reference, others, self.real or {}
        )


def load_scorers(
    recipe: Recipe,
    options: ScoringOptions | None = None,
    *,
    pool: Sequence[str] = (),
    progress: Progress = silent,
) -> Scorers:
    """Load the requested scorer and metrics; the default scorer is that of the mini.

    Raises RecipeError if a base other than the mini has neither a scorer nor a metric, or if a metric that
    needs real images has no reference.
    """
    options = options or ScoringOptions()
    own = recipe.model.is_mini and options.scorer is None
    if not own and options.scorer is None and not options.metrics:
        raise RecipeError(
            "Pass --scorer with the folder or hub id of a CLIP model, or --metric; only the mini has its own "
            "scorer."
        )
    chosen = [parse_metric(text, EXTRAS) for text in options.metrics]
    known = _known_spectrum() if own and options.reference is None else {}
    if own and all(extra.name != SPECTRUM for extra, _ in chosen):
        chosen.insert(0, parse_metric(SPECTRUM, EXTRAS))
    if duplicate := next((e.name for e, _ in chosen if [x.name for x, _ in chosen].count(e.name) > 1), None):
        raise RecipeError(f"The metric {duplicate} is given twice; give it once.")
    if options.reference is None and (
        needy := next((e for e, _ in chosen if e.real and e.name not in known), None)
    ):
        raise RecipeError(
            f"The metric {needy.name} compares with real images; pass a folder of them with --reference."
        )
    entries = find_real_images(options.reference, progress) if options.reference else []
    if options.reference and len(entries) < 2:
        raise RecipeError(
            f"A Frechet distance needs at least 2 real images, but {options.reference} has "
            f"{len(entries)} usable ones; add more."
        )
    device = distributed.device()
    source = str(mini.SCORER) if own else options.scorer
    scorer = ClipScorer.load(source, device=device) if source else None
    examiners = tuple((extra, extra.load(source, device)) for extra, source in chosen)
    if not distributed.is_main():  # only the first process computes metrics, so the others need no reference
        return Scorers(scorer, examiners=examiners)
    reference, captions = None, [*(mini.captions("test") if own else ()), *pool]
    if scorer and entries:
        reference = _features(entries, scorer.embed_images, "the scorer", progress)
    elif own:
        reference = load_file(mini.REFERENCE)["test"].float()
    real = known | {
        extra.name: _reference_statistics(extra, source, examiner, entries, progress)
        for (extra, source), (_, examiner) in zip(chosen, examiners, strict=True)
        if extra.real and extra.name not in known
    }
    return Scorers(scorer, reference, captions, examiners, real, is_mini_default=own and not entries)


def _known_spectrum() -> dict[str, Gaussian]:
    """Return the statistics of the power spectra of the mini's held-out real images."""
    return {SPECTRUM: Gaussian.fit(load_file(mini.REFERENCE)["test_spectrum"])}


def find_real_images(folder: Path, progress: Progress) -> list[ImageEntry]:
    """Return the usable images of a folder; warns about the others."""
    with progress("reading reference images", 0):
        entries, skipped = scan_images(folder, captions=False)
    skipped.warn(folder)
    return entries


def _reference_statistics(
    extra: Extra, source: str, examiner: FeatureExtractor, entries: list[ImageEntry], progress: Progress
) -> Gaussian:
    """Return feature statistics of real images, cached on disk by the images' paths, sizes and times."""
    stamps = [(str(e.path.resolve()), e.path.stat().st_size, e.path.stat().st_mtime_ns) for e in entries]
    key = hashlib.sha256(
        repr((extra.name, extra.protocol, source_stamps(source), stamps)).encode()
    ).hexdigest()[:16]
    path = setup.cache_folder() / "statistics" / f"{extra.name}-{key}.safetensors"
    with exclusive(path):
        if not path.exists():
            features = _features(
                entries,
                lambda images: examiner.extract(images, [""] * len(images))[extra.name],
                extra.name,
                progress,
            )
            fitted = Gaussian.fit(features)
            tensors = {
                "mean": fitted.mean,
                "covariance": fitted.covariance.contiguous(),
                "count": torch.tensor(fitted.count),
            }
            write_atomically(path, lambda temporary: save_file(tensors, temporary))
    found = load_file(path)
    return Gaussian(found["mean"], found["covariance"], int(found["count"]))


def _features(
    entries: list[ImageEntry],
    extract: Callable[[np.ndarray], Tensor],
    name: str,
    progress: Progress,
) -> Tensor:
    """Compute features [M, D] of real images, in chunks of one image size."""
    parts = []
    with progress(f"reference images, {name}", len(entries)) as done:
        count = 0
        for chunk in _same_size(entries):
            pixels = torch.stack([load_pixels(entry, (entry.height, entry.width)) for entry in chunk])
            parts.append(extract(to_bytes(pixels)))
            count += len(chunk)
            done(count)
    return torch.cat(parts)


def _same_size(entries: list[ImageEntry]) -> Iterator[list[ImageEntry]]:
    ordered = sorted(entries, key=lambda e: (e.height, e.width, str(e.path)))
    for _, group in groupby(ordered, key=lambda e: (e.height, e.width)):
        members = list(group)
        for start in range(0, len(members), CHUNK):
            yield members[start : start + CHUNK]


def check_scoring(options: ScoringOptions, captions: Sequence[str], *, video: bool) -> None:
    """Raise if a metric does not fit the model or the prompts, or if there are fewer than two prompts.

    Warns if there are too few prompts for intervals. Fails before sampling rather than after.
    """
    extras = [parse_metric(text, EXTRAS)[0] for text in options.metrics]
    for extra in extras:
        if extra.videos and not video:
            names = ", ".join(METRICS[m.name].title for m in extra.metrics)
            raise RecipeError(
                f"The metric {extra.name} ({names}) is for videos, but this model generates images; remove "
                "it."
            )
    if (different := len(set(captions))) < 2:
        raise RecipeError(
            f"A comparison needs at least 2 different prompts, got {different}; pass more "
            "(--count, --prompts)."
        )
    if different < MIN_SAMPLES:
        warnings.warn(
            f"{different} different prompts are too few for intervals of means and distances: only shares "
            "have "
            f"intervals and are marked as better or worse. Pass {MIN_SAMPLES} or more (--count, --prompts).",
            stacklevel=2,
        )
    for extra in extras:
        if extra.check:
            extra.check(captions)
