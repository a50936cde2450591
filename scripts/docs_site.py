"""Write the source of the documentation site: docs/ as it stands, the pages beside it, and the API reference.

    python scripts/docs_site.py build/docs && zensical build --strict    # what `make docs` does

README.md becomes the home page, CONTRIBUTING.md, AGENTS.md and scripts/mini/README.md get pages of their own.
Links between these and into docs/ are rewritten; other linked files (LICENSE, a module) are copied as text.
Needs the standard library only: mkdocstrings reads docstrings without importing when the site is built.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "AGENTS.md": "agents.md",
    "scripts/mini/README.md": "mini.md",
}
"""Pages outside docs/: where they lie, and where they come to lie in the site."""
LINK = re.compile(r"```.*?```|`[^`]*`|(!?\[[^\]]*\]\()([^)\s]+)(\))", flags=re.DOTALL)
"""A link or an image; code comes first, so that what looks like a link in it is passed over."""
REFERENCE = {
    "scalewise": (
        "What `import scalewise` offers.",
        [
            "scalewise.distill", "scalewise.load", "scalewise.pipelines.ScaleWisePipeline",
            "scalewise.load_student", "scalewise.find_recipe", "scalewise.Recipe", "scalewise.ScaleSchedule",
        ],
    ),
    "method": (
        "The paper: functions of tensors, and the training step. It imports nothing else of scalewise.",
        [
            f"scalewise.method.{name}"
            for name in ("losses", "distill", "sampling", "scales", "noise", "spectrum", "adapter",
                         "backbone", "roles", "features", "discriminator", "rng", "loss_config")
        ],
    ),
    "recipes": ("A run as a value.", ["scalewise.config.recipe", "scalewise.config.presets.published"]),
    "models": (
        "One adapter per family, and a student's file.",
        [
            f"scalewise.models.{name}"
            for name in ("pipeline_adapter", "sd3", "flux", "sdxl", "wan", "lora", "lora_keys")
        ],
    ),
    "data": ("Latent sets, image folders and prompts.",
             [f"scalewise.data.{name}" for name in ("latent_set", "image_folder", "prompts", "batches")]),
    "training": ("The trainer and a run's folder.", ["scalewise.training.trainer", "scalewise.training.run"]),
}  # fmt: skip
"""Pages of the reference: title, a sentence, and what each documents."""


def place_of(file: Path) -> Path | None:
    """Path of a file of the repository in the site's source, or None if it is no page or image of it."""
    name = file.relative_to(ROOT).as_posix()
    if name in PAGES:
        return Path(PAGES[name])
    return Path(*Path(name).parts[1:]) if name.startswith("docs/") else None


def relinked(text: str, source: Path, target: Path) -> str:
    """The text of a page with its relative links made to fit the site; raises ValueError for a broken one."""

    def fit(match: re.Match[str]) -> str:
        before, link, after = match.groups()
        if link is None:
            return match.group()
        path, sign, anchor = link.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match.group()
        file = (source.parent / path).resolve()
        file = file / "README.md" if file.is_dir() else file
        if not file.is_file():
            raise ValueError(
                f"{source.relative_to(ROOT)} links to {link}, which is not there; correct the link."
            )
        place = place_of(file)
        if place is None:
            name = file.relative_to(ROOT).as_posix()
            place = Path("files", name.replace("/", "-") + ".txt")
            (target / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / place)
        here = place_of(source)
        assert here is not None
        return f"{before}{os.path.relpath(place, here.parent)}{sign}{anchor}{after}"

    return LINK.sub(fit, text)


def reference_page(title: str, sentence: str, names: list[str]) -> str:
    """A page that mkdocstrings fills with the docstrings of modules, classes and functions."""
    return "\n\n".join([f"# {title}", sentence, *(f"::: {name}" for name in names)]) + "\n"


def write_source(target: Path) -> None:
    """Write everything that the site is built from into a folder, which is emptied first."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ROOT / "docs", target)
    sources = [ROOT / name for name in PAGES] + sorted((ROOT / "docs").rglob("*.md"))
    for source in sources:
        place = place_of(source)
        assert place is not None
        text = relinked(source.read_text(encoding="utf-8"), source, target)
        (target / place).write_text(text, encoding="utf-8")
    (target / "reference").mkdir()
    for title, (sentence, names) in REFERENCE.items():
        page = reference_page(title, sentence, names)
        (target / "reference" / f"{title}.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    write_source(Path(sys.argv[1]))
