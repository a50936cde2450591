"""Links, anchors and images of the documentation, and the source that its site is built from."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import docs_site  # noqa: E402

PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "scripts").rglob("*.md"),
     *(ROOT / "tests").rglob("*.md"), *(ROOT / "src").rglob("*.md")]
)  # fmt: skip


def links(page: Path) -> Iterator[tuple[str, str]]:
    """(text, target) of every link and image outside code."""
    for match in docs_site.LINK.finditer(page.read_text(encoding="utf-8")):
        if match[2] is not None:
            yield match[1], match[2]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings as code hosts make them: lower case, no punctuation, hyphens."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ +(.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower().strip()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for _, target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), target


def test_links_and_anchors_are_found_at_all() -> None:
    found = [target for page in PAGES for _, target in links(page)]
    assert len(found) > 60
    assert any("#" in target and not target.startswith("http") for target in found)
    assert "students-of-a-frozen-base-in-fewer-bits" in anchors(ROOT / "docs" / "results.md")


def test_every_image_says_what_it_shows() -> None:
    images = [
        (page, text)
        for page in PAGES
        for text, _ in links(page)
        if text.startswith("!")
    ]  # fmt: skip
    assert len(images) >= 10
    for page, text in images:
        assert len(text[2:-2].split()) >= 3, (page, text)
    raw = [page for page in PAGES if "<img" in page.read_text(encoding="utf-8")]
    assert not raw


def nav_of(entries: list) -> Iterator[str]:
    for entry in entries:
        for value in entry.values():
            if isinstance(value, str):
                yield value
            else:
                yield from nav_of(value)


def test_the_navigation_of_the_site_lists_every_page_once(tmp_path: Path) -> None:
    docs_site.write_source(tmp_path / "source")
    pages = sorted(p.relative_to(tmp_path / "source").as_posix() for p in (tmp_path / "source").rglob("*.md"))
    project = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(nav_of(project["nav"])) == pages


def test_links_are_made_to_fit_the_site(tmp_path: Path) -> None:
    docs_site.write_source(tmp_path / "source")
    home = (tmp_path / "source" / "index.md").read_text(encoding="utf-8")
    assert (
        "](families/README.md)" in home and "](contributing.md)" in home and "](images/students.png)" in home
    )
    wan = (tmp_path / "source" / "families" / "wan.md").read_text(encoding="utf-8")
    assert "](../mini.md)" in wan and "](../results.md#" in wan
    guide = (tmp_path / "source" / "guide.md").read_text(encoding="utf-8")
    copied = re.search(r"\]\((files/[\w.-]+\.txt)\)", guide)
    assert copied and (tmp_path / "source" / copied[1]).is_file()


def test_a_broken_link_stops_the_site(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"links to nowhere\.md, which is not there"):
        docs_site.relinked("see [this](nowhere.md)", ROOT / "README.md", tmp_path)
    code = "`[this](nowhere.md)`\n```\n[this](nowhere.md)\n```\n"
    assert docs_site.relinked(code, ROOT / "README.md", tmp_path) == code


def test_the_reference_names_what_exists_and_has_a_docstring() -> None:
    for _, names in docs_site.REFERENCE.values():
        for name in names:
            try:
                found = importlib.import_module(name)
            except ModuleNotFoundError:
                module, _, attribute = name.rpartition(".")
                found = getattr(importlib.import_module(module), attribute)
            assert found.__doc__, name
