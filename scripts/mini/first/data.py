"""Stage 1: the pictures of the mini and their captions, built from npm packages of freely licensed emoji.

    python scripts/mini/first/data.py              # fetch, render, write mini-work/data: a minute on one core
    python scripts/mini/first/data.py --npm FOLDER # use (or fill) this folder of unpacked packages instead

Five designer-drawn sets (Apache-2.0 and MIT) are rendered at 128 x 128 pixels on white; the names of Unicode
(emojibase, MIT) become short English captions, "a red apple, noto style". Skin tones, flags, keycaps, clocks,
family combinations, signs that are mostly letters and near-duplicates are left out. The outcome is the same
on every machine: versions are pinned, and nothing is drawn at random. Needs npm and the extra `mini`.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import io
import json
import re
import subprocess
import tarfile
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import resvg_py
from captions import TABLES, caption_text
from common import work_folder
from PIL import Image

SIZE = 128
THUMB = 32
"""Near-duplicates are compared at this size."""
SAME = 0.02
"""Two images closer than this (RMSE of thumbnails, colours in [0, 1]) count as the same."""
EMOJIBASE = ("emojibase-data", "17.0.0")
SHORTCODES = ("iamcal", "joypixels", "emojibase-legacy", "emojibase")
"""Tables of short names, the first that knows a name wins."""


@dataclass(frozen=True)
class Style:
    """One set of drawings: where it comes from, how captions call it, how much of the canvas it fills."""

    package: str
    version: str
    words: str
    fill: float
    licence: str


STYLES = {
    "noto": Style("@iconify-json/noto", "1.2.9", "noto style", 0.93, "Apache-2.0"),
    "noto-v1": Style("@iconify-json/noto-v1", "1.2.5", "noto blob style", 0.89, "Apache-2.0"),
    "fluent": Style("@iconify-json/fluent-emoji", "1.2.7", "fluent style", 1.0, "MIT"),
    "fluent-flat": Style("@iconify-json/fluent-emoji-flat", "1.2.6", "flat fluent style", 1.0, "MIT"),
    "fxemoji": Style("@iconify-json/fxemoji", "1.2.2", "firefox style", 0.89, "Apache-2.0"),
}
REDRAWN = (("noto-v1", "noto"), ("fluent-flat", "fluent"), ("fxemoji", "noto"))
"""Pairs (later, earlier) of sets that share drawings: the later one's copy is left out."""


@dataclass(frozen=True)
class Symbol:
    """One emoji of Unicode: code points, name and place in emojibase's groups."""

    codepoint: str
    label: str
    group: str
    subgroup: str
    tags: tuple[str, ...]
    toned: bool
    order: int


@dataclass(frozen=True)
class Drawing:
    """One drawing with its caption text; `symbol` is None where only the icon's own name tells what it is."""

    style: str
    name: str
    text: str
    label: str
    symbol: Symbol | None
    body: str
    box: tuple[float, float, float, float]


# ---------------------------------------------------------------------------------------------- packages


def package_folder(npm: Path, package: str, number: str) -> Path:
    """Return the folder of an unpacked package, named as `npm pack` names its tarball."""
    return npm / f"{package.lstrip('@').replace('/', '-')}-{number}"


def fetch(npm: Path) -> None:
    """Fetch with `npm pack` and unpack each package that is not in `npm` already."""
    npm.mkdir(parents=True, exist_ok=True)
    for package, number in [EMOJIBASE, *((s.package, s.version) for s in STYLES.values())]:
        folder = package_folder(npm, package, number)
        if folder.exists():
            continue
        tarball = folder.with_name(folder.name + ".tgz")
        if not tarball.exists():
            print(f"fetching {package} {number}", flush=True)
            subprocess.run(["npm", "pack", "--silent", f"{package}@{number}"], cwd=npm, check=True)
        # Unpacked beside its place and then renamed, so that a run cut short leaves no half package.
        partial = folder.with_name(folder.name + ".partial")
        with tarfile.open(tarball) as archive:
            archive.extractall(partial, filter="data")
        (partial / "package").rename(folder)
        partial.rmdir()


def read_json(path: Path) -> dict:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------- names


def bare(hexcode: str) -> str:
    """Return code points in lower case without the variation selector, as all tables here are keyed."""
    return hexcode.lower().replace("-fe0f", "")


def squash(name: str) -> str:
    """Return only the letters and digits of a name: the Firefox set writes names without spaces."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


class Names:
    """Finds the Unicode symbol that an icon of one of the sets shows."""

    def __init__(self, npm: Path) -> None:
        base = package_folder(npm, *EMOJIBASE)
        entries = read_json(base / "en" / "data.json")
        groups = read_json(base / "meta" / "groups.json")
        self.symbols = {symbol.codepoint: symbol for entry in entries for symbol in _forms(entry, groups)}
        self.by_squashed: dict[str, str] = {}
        for name, codepoint in _names_of(entries, base / "en" / "shortcodes"):
            if squash(name):
                self.by_squashed.setdefault(squash(name), codepoint)
        self.by_icon = dict(TABLES["codepoints"])
        for style in STYLES.values():
            characters = package_folder(npm, style.package, style.version) / "chars.json"
            for codepoint, name in read_json(characters).items():
                self.by_icon.setdefault(name, bare(codepoint))

    def find(self, style: str, name: str) -> Symbol | None:
        """Return the symbol of icon `name` in a set, or None where no table knows it."""
        codepoint = self.by_squashed.get(squash(name)) if style == "fxemoji" else self.by_icon.get(name)
        return self.symbols.get(codepoint) if codepoint else None


def _forms(entry: dict, groups: dict) -> Iterator[Symbol]:
    """Yield the symbol of an emojibase entry and those of its skin tones."""
    for form in (entry, *entry.get("skins", ())):
        yield Symbol(
            codepoint=bare(form["hexcode"]),
            label=form["label"],
            group=groups["groups"].get(str(entry.get("group")), "component"),
            subgroup=groups["subgroups"].get(str(entry.get("subgroup")), ""),
            tags=tuple(entry.get("tags", ())),
            toned=form is not entry,
            order=entry.get("order", 99999),
        )


def _names_of(entries: list[dict], shortcodes: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, code points), the most trusted source first: emojibase, Unicode, shortcodes."""
    for entry in entries:
        yield entry["label"], bare(entry["hexcode"])
    for entry in entries:
        codepoint = bare(entry["hexcode"])
        if "-" not in codepoint:
            yield unicodedata.name(chr(int(codepoint, 16)), ""), codepoint
    for source in SHORTCODES:
        for hexcode, names in read_json(shortcodes / f"{source}.json").items():
            for name in [names] if isinstance(names, str) else names:
                yield name, bare(hexcode)


# ------------------------------------------------------------------------------------ which drawings stay


def reason_left_out(symbol: Symbol) -> str | None:
    """Name why a symbol is left out, or return None where it stays."""
    label, subgroup = symbol.label, symbol.subgroup
    reasons = {
        "skin tone": symbol.toned,
        "flag": symbol.group == "flags",
        "component": symbol.group == "component" or not subgroup,
        "keycap": subgroup == "keycap",
        "reads as text": subgroup == "alphanum" or label in TABLES["reads_as_text"],
        "copy facing right": "facing right" in label,
        "clock": subgroup == "time" and re.search(r"o’clock|thirty", label),
        "family": subgroup in ("family", "person-symbol") and ":" in label,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def drawings_of(style: str, icons: dict, names: Names, left_out: collections.Counter) -> Iterator[Drawing]:
    """Yield the drawings of one set that can be named, also those that `reason_left_out` will refuse."""
    width, height = icons.get("width", 16), icons.get("height", 16)
    for name, icon in icons["icons"].items():
        symbol = names.find(style, name)
        text = caption_text(symbol.label, symbol.subgroup) if symbol else ""
        label = symbol.label if symbol else ""
        if style == "fxemoji" and name in TABLES["firefox_names"]:
            symbol, text, label = None, TABLES["firefox_names"][name], name
        if style == "noto-v1" and name == "pistol":  # Unicode has since made it a water pistol
            text = "a pistol"
        broken = style == "fxemoji" and name in TABLES["firefox_broken"]
        if icon.get("hidden") or broken or not text:
            left_out["hidden" if icon.get("hidden") else "broken" if broken else "no name"] += 1
            continue
        left, top = icon.get("left", 0), icon.get("top", 0)
        box = (left, top, icon.get("width", width), icon.get("height", height))
        yield Drawing(style, name, text, label, symbol, icon["body"], box)


def collect(npm: Path) -> tuple[list[Drawing], dict[str, collections.Counter]]:
    """Return the drawings to render, in their final order, and the count of those left out by reason."""
    names, every, chosen = Names(npm), [], []
    left_out = {style: collections.Counter() for style in STYLES}
    for style, origin in STYLES.items():
        icons = read_json(package_folder(npm, origin.package, origin.version) / "icons.json")
        seen = set()
        for drawing in drawings_of(style, icons, names, left_out[style]):
            every.append(drawing)
            key = drawing.symbol.codepoint if drawing.symbol else drawing.text
            reason = reason_left_out(drawing.symbol) if drawing.symbol else None
            if reason is None and key in seen:
                reason = "same symbol"
            if reason:
                left_out[style][reason] += 1
            else:
                seen.add(key)
                chosen.append(drawing)
    # A drawing known only by its own name takes the symbol of the same phrase in another set.
    symbols = {drawing.text: drawing.symbol for drawing in every if drawing.symbol}
    chosen = [d if d.symbol else replace(d, symbol=symbols.get(d.text)) for d in chosen]
    rank = list(STYLES)
    chosen.sort(key=lambda d: (rank.index(d.style), d.symbol.order if d.symbol else 99998, d.name))
    return chosen, left_out


# ---------------------------------------------------------------------------------------------- pictures


def render(drawing: Drawing) -> np.ndarray:
    """Render a drawing on white: uint8 [SIZE, SIZE, 3]."""
    width = SIZE * STYLES[drawing.style].fill
    offset = (SIZE - width) / 2
    box = " ".join(str(number) for number in drawing.box)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}">'
        f'<svg x="{offset}" y="{offset}" width="{width}" height="{width}" viewBox="{box}">'
        f"{drawing.body}</svg></svg>"
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
    if (pixels[..., 3] > 16).mean() < 0.004:
        raise ValueError(f"{drawing.style}:{drawing.name} renders empty; is resvg_py 0.5.0 installed?")
    alpha = pixels[..., 3:].astype(np.float32) / 255
    return np.rint(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def render_all(drawings: list[Drawing]) -> np.ndarray:
    """Render all drawings: uint8 [N, SIZE, SIZE, 3]."""
    images = np.empty((len(drawings), SIZE, SIZE, 3), np.uint8)
    started = time.time()
    for i, drawing in enumerate(drawings):
        images[i] = render(drawing)
        if (i + 1) % 500 == 0 or i + 1 == len(drawings):
            print(f"rendered {i + 1} of {len(drawings)} in {time.time() - started:.0f} s", flush=True)
    return images


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Average each image to THUMB x THUMB pixels: float32 [N, THUMB * THUMB * 3] in [0, 1]."""
    side = SIZE // THUMB
    small = [image.reshape(THUMB, side, THUMB, side, 3).mean((1, 3)) for image in images]
    return np.stack(small).reshape(len(images), -1).astype(np.float32) / 255


def near_duplicates(images: np.ndarray, styles: np.ndarray) -> dict[int, tuple[int, float]]:
    """Map the index of each image to leave out to the index of the one that stays and their distance.

    Within a set the first of several alike stays; between two sets in REDRAWN, the earlier set's.
    """
    thumbs = thumbnails(images)
    squares = (thumbs**2).sum(1)
    same_as: dict[int, tuple[int, float]] = {}

    def compare(later: np.ndarray, earlier: np.ndarray) -> None:
        cross = squares[later][:, None] + squares[earlier][None] - 2 * thumbs[later] @ thumbs[earlier].T
        distance = np.sqrt(np.maximum(cross, 0) / thumbs.shape[1])
        for row, i in enumerate(later):
            for column in np.flatnonzero(distance[row] < SAME):
                j = int(earlier[column])
                if (j < i or styles[i] != styles[j]) and j not in same_as:
                    same_as[int(i)] = (j, float(distance[row, column]))
                    break

    for style in STYLES:
        members = np.flatnonzero(styles == style)
        compare(members, members)
    for later, earlier in REDRAWN:
        remaining = np.array([i for i in np.flatnonzero(styles == later) if i not in same_as])
        compare(remaining, np.flatnonzero(styles == earlier))
    return same_as


# ----------------------------------------------------------------------------------------------- records


def split_of(text: str, style: str) -> str:
    """Hold out a tenth, chosen by a hash of phrase and style, so that it never depends on the order."""
    return "test" if int(hashlib.md5(f"{text}|{style}".encode()).hexdigest(), 16) % 10 == 0 else "train"


def record(drawing: Drawing) -> dict:
    """Return what captions.json says of one image."""
    style, symbol = STYLES[drawing.style], drawing.symbol
    return {
        "caption": f"{drawing.text}, {style.words}",
        "text": drawing.text,
        "style": drawing.style,
        "name": drawing.name,
        "label": drawing.label,
        "category": symbol.group if symbol else "other",
        "subcategory": symbol.subgroup if symbol else "",
        "codepoint": symbol.codepoint if symbol else None,
        "tags": list(symbol.tags) if symbol else [],
        "split": split_of(drawing.text, drawing.style),
        "licence": style.licence,
    }


def statistics(records: list[dict], left_out: dict, duplicates: list[dict]) -> dict:
    """Return the counts that stats.json keeps."""
    words = {word for r in records for word in r["caption"].replace(",", "").split()}
    return {
        "images": len(records),
        "texts": len({r["text"] for r in records}),
        "words": len(words),
        "words_per_caption": round(float(np.mean([len(r["caption"].split()) for r in records])), 2),
        **{
            key: collections.Counter(r[key] for r in records)
            for key in ("style", "split", "category", "licence")
        },
        "left_out": left_out,
        "near_duplicates": duplicates,
        "packages": {s.package: s.version for s in STYLES.values()} | dict([EMOJIBASE]),
        "resvg_py": version("resvg_py"),
    }


def build(npm: Path, out: Path) -> None:
    """Build the set from the packages in `npm` and write it to the folder `out`."""
    fetch(npm)
    drawings, left_out = collect(npm)
    for style, counts in left_out.items():
        print(f"{style}: {sum(d.style == style for d in drawings)} drawings; left out: {dict(counts)}")
    images = render_all(drawings)
    same_as = near_duplicates(images, np.array([d.style for d in drawings]))
    full_name = [f"{d.style}:{d.name}" for d in drawings]
    duplicates = [
        {"image": full_name[i], "same_as": full_name[j], "rmse": round(distance, 4)}
        for i, (j, distance) in same_as.items()
    ]
    keep = [i for i in range(len(drawings)) if i not in same_as]
    records = [record(drawings[i]) for i in keep]
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "emoji128.npy", images[keep])
    (out / "captions.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    stats = statistics(records, left_out, duplicates)
    (out / "stats.json").write_text(json.dumps(stats, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{len(records)} images, {stats['texts']} phrases, {len(same_as)} near-duplicates left out: {out}")


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description="Build the pictures and captions of the mini.")
    parser.add_argument("--npm", type=Path, help="folder of npm packages (default: npm in the work folder)")
    chosen = parser.parse_args()
    build(chosen.npm or work_folder() / "npm", work_folder() / "data")


if __name__ == "__main__":
    main()
