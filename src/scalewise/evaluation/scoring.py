"""Who judges drawn pictures: a scorer, further metrics, and the real pictures that they are held against."""

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
from scalewise.metrics import EXTRAS, METRICS, ClipScorer, Seen
from scalewise.metrics.base import Examiner, Gaussian
from scalewise.metrics.extras import Extra, parse_metric, stamp
from scalewise.metrics.intervals import FEWEST
from scalewise.training import setup

CHUNK = 32
SCORER, SPECTRUM = "scorer", "spectrum"


@dataclass(frozen=True)
class Asked:
    """What a comparison is asked to judge by."""

    scorer: str | None = None
    """A CLIP model's folder or hub id; None: the mini's own, and none for other bases."""
    metrics: tuple[str, ...] = ()
    """NAME or NAME=SOURCE of further metrics."""
    reference: Path | None = None
    """A folder of real pictures; None: the features that come with the mini."""


@dataclass(frozen=True)
class Judge:
    """A scorer with real pictures to compare with, and captions to tell a prompt from."""

    scorer: ClipScorer | None
    reference: Tensor | None = None
    """The scorer's features of real pictures [M, D]; without them there is no Frechet distance."""
    pool: Sequence[str] = ()
    """Further captions: prompt match needs 50 different ones, those of the prompts included."""
    examiners: tuple[tuple[Extra, Examiner], ...] = ()
    real: dict[str, Gaussian] | None = None
    """Real pictures by metric, for those examiners that need them."""
    is_minis: bool = False
    """The mini's own scorer and reference: what real pictures reach by them is known."""

    def warn_of_few(self, drawn: int) -> None:
        """Warn where a covariance of so many drawn pictures, or of the real ones, is not of full rank."""
        shapes = {} if self.reference is None else {"the scorer": self.reference.shape}
        for name in (extra.name for extra, _ in self.examiners if extra.frechet):
            if real := (self.real or {}).get(name):
                shapes[name] = torch.Size((real.count, len(real.mean)))
        for name, (real_count, width) in shapes.items():
            for count, which in ((real_count, "real"), (drawn, "drawn")):
                if count <= width:
                    warnings.warn(
                        f"{count:,} {which} pictures are no more than the {width:,} features of {name}: its "
                        "Fréchet distances are biased upwards and compare only with others of equally many "
                        "pictures.",
                        stacklevel=2,
                    )

    def see(self, images: np.ndarray, prompts: Prompts) -> Seen:
        """What the judges make of bytes [N, H, W, 3], or videos [N, F, H, W, 3], drawn for the prompts."""
        return self.seen(self.look(images, prompts.captions), prompts)

    def look(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the judges make of each picture by itself, by metric; the scorer's features under SCORER.

        Of a video the middle frame stands for it, but for metrics of videos.
        """
        looks: dict[str, Tensor] = {}
        for extra, examiner in self.examiners:
            looks |= examiner.look(images if extra.videos else middle_frames(images), captions)
        if self.scorer:
            looks[SCORER] = self.scorer.pictures(middle_frames(images))
        return looks

    def seen(self, looks: Mapping[str, Tensor], prompts: Prompts) -> Seen:
        """Put together what `look` made of the prompts' pictures, their captions and the pool's."""
        others = {name: rows for name, rows in looks.items() if name != SCORER}
        captions = list(dict.fromkeys([*prompts.unique, *self.pool]))
        texts = self.scorer.texts(captions) if self.scorer else None
        return Seen(looks.get(SCORER), prompts.number, texts, self.reference, others, self.real or {})


def judge_of(
    recipe: Recipe,
    asked: Asked | None = None,
    *,
    pool: Sequence[str] = (),
    progress: Progress = silent,
) -> Judge:
    """The judges that were asked for: the mini's own scorer unless another is named, and the extras.

    Raises RecipeError when a base other than the mini is given neither a scorer nor a metric, and when a
    metric that needs real pictures is asked for without any.
    """
    asked = asked or Asked()
    own = recipe.model.is_mini and asked.scorer is None
    if not own and asked.scorer is None and not asked.metrics:
        raise RecipeError(
            "Give --scorer with a CLIP model's folder or hub id, or a --metric; only the mini has a judge of "
            "its own."
        )
    chosen = [parse_metric(text, EXTRAS) for text in asked.metrics]
    known = _known_spectrum() if own and asked.reference is None else {}
    if own and all(extra.name != SPECTRUM for extra, _ in chosen):
        chosen.insert(0, parse_metric(SPECTRUM, EXTRAS))
    if twice := next((e.name for e, _ in chosen if [x.name for x, _ in chosen].count(e.name) > 1), None):
        raise RecipeError(f"The metric {twice} is asked for twice; name it once.")
    if asked.reference is None and (
        lacking := next((e for e, _ in chosen if e.real and e.name not in known), None)
    ):
        raise RecipeError(
            f"The metric {lacking.name} holds pictures against real ones; give a folder of them with "
            "--reference."
        )
    entries = real_pictures(asked.reference, progress) if asked.reference else []
    if asked.reference and len(entries) < 2:
        raise RecipeError(
            f"A Frechet distance needs at least 2 real pictures, and {asked.reference} holds {len(entries)} "
            "that can be used; give more."
        )
    device = distributed.device()
    source = str(mini.SCORER) if own else asked.scorer
    scorer = ClipScorer.load(source, device=device) if source else None
    examiners = tuple((extra, extra.load(source, device)) for extra, source in chosen)
    if not distributed.is_main():  # takes no figures, which is what real pictures are for
        return Judge(scorer, examiners=examiners)
    reference, captions = None, [*(mini.captions("test") if own else ()), *pool]
    if scorer and entries:
        reference = _features(entries, scorer.pictures, "the scorer", progress)
    elif own:
        reference = load_file(mini.REFERENCE)["test"].float()
    real = known | {
        extra.name: _real(extra, source, examiner, entries, progress)
        for (extra, source), (_, examiner) in zip(chosen, examiners, strict=True)
        if extra.real and extra.name not in known
    }
    return Judge(scorer, reference, captions, examiners, real, is_minis=own and not entries)


def _known_spectrum() -> dict[str, Gaussian]:
    """The power levels of the mini's real pictures, held out."""
    return {SPECTRUM: Gaussian.fit(load_file(mini.REFERENCE)["test_spectrum"])}


def real_pictures(folder: Path, progress: Progress) -> list[ImageEntry]:
    """The usable pictures of a folder; those that are not are warned of."""
    with progress("reading real pictures", 0):
        entries, skipped = scan_images(folder, captions=False)
    skipped.warn(folder)
    return entries


def _real(
    extra: Extra, source: str, examiner: Examiner, entries: list[ImageEntry], progress: Progress
) -> Gaussian:
    """Statistics of real pictures, kept: thousands of them need not be read at every evaluation."""
    stamps = [(str(e.path.resolve()), e.path.stat().st_size, e.path.stat().st_mtime_ns) for e in entries]
    key = hashlib.sha256(repr((extra.name, extra.protocol, stamp(source), stamps)).encode()).hexdigest()[:16]
    path = setup.cache_folder() / "statistics" / f"{extra.name}-{key}.safetensors"
    with exclusive(path):
        if not path.exists():
            features = _features(
                entries,
                lambda images: examiner.look(images, [""] * len(images))[extra.name],
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
    look: Callable[[np.ndarray], Tensor],
    name: str,
    progress: Progress,
) -> Tensor:
    """Features [M, D] of real pictures, a chunk of one size at a time."""
    parts = []
    with progress(f"real pictures, {name}", len(entries)) as done:
        seen = 0
        for chunk in _same_size(entries):
            pixels = torch.stack([load_pixels(entry, (entry.height, entry.width)) for entry in chunk])
            parts.append(look(to_bytes(pixels)))
            seen += len(chunk)
            done(seen)
    return torch.cat(parts)


def _same_size(entries: list[ImageEntry]) -> Iterator[list[ImageEntry]]:
    ordered = sorted(entries, key=lambda e: (e.height, e.width, str(e.path)))
    for _, group in groupby(ordered, key=lambda e: (e.height, e.width)):
        members = list(group)
        for start in range(0, len(members), CHUNK):
            yield members[start : start + CHUNK]


def check_asked(asked: Asked, captions: Sequence[str], *, video: bool) -> None:
    """Refuse metrics that fit neither the model nor the prompts, and a single prompt; warn of few prompts.

    What drawn pictures would show an hour later is told before the first one.
    """
    extras = [parse_metric(text, EXTRAS)[0] for text in asked.metrics]
    for extra in extras:
        if extra.videos and not video:
            names = ", ".join(METRICS[m.name].title for m in extra.metrics)
            raise RecipeError(f"The metric {extra.name} ({names}) is of videos; this model draws pictures.")
    if (different := len(set(captions))) < 2:
        raise RecipeError(
            f"A comparison needs at least 2 different prompts, not {different}; draw more "
            "(--count, --prompts)."
        )
    if different < FEWEST:
        warnings.warn(
            f"{different} different prompts are too few for the interval of a mean or a distance: only "
            "shares have intervals, and better or worse is said of nothing else. Give "
            f"{FEWEST} or more (--count, --prompts).",
            stacklevel=2,
        )
    for extra in extras:
        if extra.check:
            extra.check(captions)
