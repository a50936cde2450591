"""Image folders of real users: links, camera files, large scans, caption formats, Unicode names."""

from __future__ import annotations

import json
import os
import unicodedata
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from scalewise.common import images as pictures
from scalewise.common.images import read_image
from scalewise.config.presets import find_recipe
from scalewise.data import DataError, assign_buckets, encode_folder, load_pixels, scan_images
from scalewise.data.image_folder import ImageEntry, bucket_warnings, describe_buckets
from scalewise.evaluation.samplers import parse_sampler
from scalewise.evaluation.stored_images import SamplerError, read_folder
from scalewise.method.scales import Scale

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
FULL = Scale(1, 16, 16)


def paint(path: Path, caption: str | None = None, size: tuple[int, int] = (40, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 0, 0)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def captions(folder: Path) -> dict[str, str]:
    return {image.path.name: image.caption for image in scan_images(folder)[0]}


# --- Finding files ---


def test_links_to_folders_and_files_are_followed_and_loops_end(tmp_path):
    root = tmp_path / "in"
    paint(root / "own.png", "own")
    paint(tmp_path / "store" / "deep" / "far.png", "far")
    paint(tmp_path / "store" / "near.png", "near")
    paint(tmp_path / "blobs" / "0f3a.png")
    (root / "linked").symlink_to(tmp_path / "store")
    (root / "again").symlink_to(tmp_path / "store" / "deep")
    (root / "file.png").symlink_to(tmp_path / "blobs" / "0f3a.png")
    (root / "file.txt").write_text("a linked file")
    (tmp_path / "store" / "deep" / "up").symlink_to(root)
    (tmp_path / "store" / "self").symlink_to(tmp_path / "store")
    assert captions(root) == {
        "own.png": "own",
        "far.png": "far",
        "near.png": "near",
        "file.png": "a linked file",
    }
    assert len(scan_images(root)[0]) == 4  # a folder with two links is read once
    (tmp_path / "link").symlink_to(root)
    assert len(scan_images(tmp_path / "link")[0]) == 4


def test_broken_links_are_counted_and_named(tmp_path):
    paint(tmp_path / "a.png", "a")
    (tmp_path / "gone.png").symlink_to(tmp_path / "unmounted" / "gone.png")
    (tmp_path / "disk").symlink_to(tmp_path / "unmounted")
    _, skipped = scan_images(tmp_path)
    assert skipped.others == ("2 broken links or folders that cannot be opened (disk, gone.png)",)


def test_files_that_are_not_read_are_counted_by_suffix_on_every_call(tmp_path):
    paint(tmp_path / "in" / "a.png", "a")
    kinds = {".CR2": 9, ".mov": 2, ".psd": 1, ".HEIC": 3, "": 1, ".zip": 1, ".json": 5, ".npz": 5, ".xmp": 9}
    for suffix, count in kinds.items():
        for number in range(count):
            (tmp_path / "in" / f"{suffix.lower().strip('.')}{number}{suffix}").write_bytes(b"?")
    words = (
        "17 files are not read: 9 .cr2, 3 .heic, 2 .mov, 1 without a suffix, 1 .psd, 1 .zip; convert images "
        "to JPEG or PNG"
    )
    _, skipped = scan_images(tmp_path / "in")
    assert skipped.others == (words,) and skipped.reasons == {}
    for _ in range(2):  # the second time everything is in the cache
        with pytest.warns(UserWarning, match=words):
            encode(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "a.png").unlink()
    with pytest.raises(DataError, match=r"No usable image.*17 files are not read: 9 \.cr2"):
        scan_images(tmp_path / "in")


# --- Captions ---


@pytest.mark.parametrize(("on_disk", "written"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_names_match_in_either_unicode_form(tmp_path, on_disk, written):
    for number, place in enumerate(("jsonl", "beside", "folder")):
        inside = on_disk if place == "folder" else "x"
        paint(tmp_path / place / inside / f"{on_disk}.png")
        if place == "beside":
            (tmp_path / place / inside / f"{written}.txt").write_text(str(number))
        else:
            name = f"{written if place == 'folder' else 'x'}/{written}.png"
            row = json.dumps({"file_name": name, "text": str(number)}, ensure_ascii=False)
            (tmp_path / place / "metadata.jsonl").write_text(row, encoding="utf-8")
        ((image,), skipped) = scan_images(tmp_path / place)
        assert image.caption == str(number) and skipped.reasons == {}
    ((image,), _) = scan_images(tmp_path / "jsonl", captions=False)
    assert image.path.exists()


def test_images_to_judge_are_found_by_their_prompt_in_either_unicode_form(tmp_path):
    for name, color in ((DECOMPOSED, 10), ("b", 20)):
        Image.new("RGB", (8, 8), (color, 0, 0)).save(tmp_path / f"{name}.png")
    folder = parse_sampler(f"folder:{tmp_path}", find_recipe("mini"))
    images = read_folder(folder.path, ["b", COMPOSED])
    assert images[:, 0, 0, 0].tolist() == [20, 10]
    with pytest.raises(SamplerError, match="too few images with the caption 'c'"):
        read_folder(folder.path, ["c"])


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("linked", [True, False])
def test_metadata_may_have_absolute_paths_even_if_the_folder_is_given_as_a_relative_one(
    tmp_path, monkeypatch, relative, linked
):
    root = tmp_path / "in"
    for name in ("a", "b", "c"):
        paint(root / "sub" / f"{name}.png")
    if linked:
        (tmp_path / "link").symlink_to(root)
    rows = [
        {"file_name": str(root / "sub" / "a.png"), "text": "absolute"},
        {"file_name": "./sub/../sub/b.png", "text": "with dots"},
        {"file_name": "sub/c.png", "text": "plain"},
    ]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    name = Path("link" if linked else "in")
    folder = name if relative else tmp_path / name
    assert captions(folder) == {"a.png": "absolute", "b.png": "with dots", "c.png": "plain"}
    assert scan_images(folder)[1].reasons == {}


def test_images_in_the_metadata_but_not_in_the_folder_are_counted(tmp_path):
    paint(tmp_path / "in" / "a.png")
    paint(tmp_path / "other" / "b.png")
    rows = {"a.png": "a", str(tmp_path / "other" / "b.png"): "b", "c.png": "c", "d.png": "d"}
    (tmp_path / "in" / "captions.json").write_text(json.dumps(rows))
    assert scan_images(tmp_path / "in")[1].counts == {
        "named in the metadata but outside the folder or not an image": 1,
        "named in the metadata but missing": 2,
    }


@pytest.mark.parametrize("column", ["text", "caption", "prompt", "Prompt", " TEXT"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_the_caption_column_may_be_named_text_caption_or_prompt(tmp_path, column, kind):
    paint(tmp_path / "a.png")
    paint(tmp_path / "b.png")
    rows = [{"file_name": "a.png", column: "a cat"}, {"file_name": "b.png", column: "a \u00e9 dog"}]
    if kind == "csv":
        lines = [f"file_name,{column}", *(f"{row['file_name']},{row[column]}" for row in rows)]
        (tmp_path / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    else:
        text = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
        name = "captions.json" if kind == "json" else "metadata.jsonl"
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert captions(tmp_path) == {"a.png": "a cat", "b.png": "a \u00e9 dog"}


def test_metadata_without_a_caption_column_warns_with_its_columns(tmp_path):
    paint(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,description\na.png,a cat\n")
    with (
        pytest.warns(
            UserWarning, match=r"metadata.csv has no captions: none of its columns \(description, file_name"
        ),
        pytest.raises(DataError, match=r"1 without a caption \(a.png\)"),
    ):
        scan_images(tmp_path)


def test_unreadable_tables_are_rejected_by_name(tmp_path):
    paint(tmp_path / "a.png")
    table = tmp_path / "metadata.parquet"
    table.write_bytes(b"no table")
    with pytest.raises(DataError, match=r"metadata.parquet is not a Parquet table"):
        scan_images(tmp_path)
    pq.write_table(pa.Table.from_pylist([{"image": b"...", "label": 3}]), table)
    with pytest.raises(DataError, match=r"has no column file_name, only image, label; images inside a table"):
        scan_images(tmp_path)
    pq.write_table(pa.Table.from_pylist([{"file_name": "a.png", "text": 3}]), table)
    with pytest.raises(DataError, match=r"metadata.parquet, row 1, has a caption that is not text, 3"):
        scan_images(tmp_path)


def test_caption_files_of_kohya_are_read_and_txt_comes_first(tmp_path):
    for name, files in {"a": {".caption": "kohya"}, "b": {".caption": "kohya", ".txt": "text"},
                        "c": {".caption": "kohya", ".txt": " "}, "d": {".TXT": "upper"}}.items():  # fmt: skip
        paint(tmp_path / f"{name}.png")
        for suffix, words in files.items():
            (tmp_path / f"{name}{suffix}").write_text(words)
    assert captions(tmp_path) == {"a.png": "kohya", "b.png": "text", "c.png": "kohya", "d.png": "upper"}


# --- Large scans ---


def test_an_image_beyond_pillows_limit_is_read_and_the_limit_is_restored(tmp_path, monkeypatch):
    path = paint(tmp_path / "scan.png", "a scan", (100, 80))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # 8,000 pixels are more than twice as many
    monkeypatch.setattr(pictures, "MAX_PARALLEL_PIXELS", 3000)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)
    paint(tmp_path / "small.png", "small", (10, 10))
    entries, skipped = scan_images(tmp_path)
    assert skipped.reasons == {} and [(e.width, e.height) for e in entries] == [(100, 80), (10, 10)]
    assert load_pixels(entries[0], (16, 16)).shape == (3, 16, 16)
    assert read_image(path).shape == (80, 100, 3)
    assert Image.MAX_IMAGE_PIXELS == 3000


def test_an_image_too_large_for_memory_is_rejected_with_its_name_and_size(tmp_path, monkeypatch):
    path = paint(tmp_path / "poster.png", "a poster", (3000, 2000))
    paint(tmp_path / "a.png", "a")
    monkeypatch.setattr(pictures, "MAX_PIXELS", 5_000_000)
    _, skipped = scan_images(tmp_path)
    ((reason, files),) = skipped.reasons.items()
    assert files == [path] and "megapixels (save a smaller copy)" in reason
    with pytest.raises(
        DataError, match=r"poster.png has 6 megapixels, more than the maximum of 5; save a smaller copy"
    ):
        load_pixels(ImageEntry(path, "", 3000, 2000), (16, 16))


# --- Buckets ---


class Pixels:
    """An adapter whose VAE is area pooling by 2."""

    base, vae_factor, patch, channels = "fake", 2, 2, 3

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(pixels, 2)


def encode(folder: Path, out: Path, **options) -> list[str]:
    said: list[str] = []
    encode_folder(
        Pixels(),
        folder,
        out,
        full=FULL,
        vae_key="v",
        scales_for=lambda full: [full],
        on_note=said.append,
        **options,
    )
    return said


def entries(*sizes: tuple[int, int, int]) -> list[ImageEntry]:
    return [ImageEntry(Path("x.png"), "", w, h) for w, h, count in sizes for _ in range(count)]


def test_the_line_about_buckets_has_their_images_and_the_area_kept():
    full = Scale(1, 64, 64)
    images = entries((500, 500, 6), (600, 500, 1), (1920, 1080, 4))
    buckets = assign_buckets(images, full, patch=2, mode="buckets")
    # 600x500 in 74x56 (1.32) keeps 1.2 / 1.3214; 1920x1080 (1.778) in 86x48 (1.792) 99%.
    assert describe_buckets(buckets) == (
        "3 aspect buckets: 48x86 keeps 4 images and 99% of their area, 58x72 1 and 97%, 64x64 6 and 100%"
    )
    assert bucket_warnings(buckets, full, patch=2, min_images=1) == []


def test_removed_buckets_are_named_with_their_images():
    full = Scale(1, 64, 64)
    images = entries((500, 500, 6), (640, 480, 5), (1920, 1080, 2), (100, 200, 1))
    buckets = assign_buckets(images, full, patch=2, mode="buckets", min_images=5)
    (told,) = bucket_warnings(buckets, full, patch=2, min_images=5)
    assert told == (
        "3 images are cropped to the next aspect bucket, because their nearest one has fewer images than a "
        "batch of 5: 48x86 (2), 90x46 (1)"
    )


def test_a_full_size_without_images_causes_a_warning():
    full = Scale(1, 64, 64)
    images = entries((500, 500, 2), (1920, 1080, 9))
    buckets = assign_buckets(images, full, patch=2, mode="buckets", min_images=5)
    assert full not in buckets
    dissolved, lost = bucket_warnings(buckets, full, patch=2, min_images=5)
    assert dissolved.startswith("2 images are cropped") and dissolved.endswith("64x64 (2)")
    assert lost.startswith("no image is trained at the full size 64x64") and "only 2 have its shape" in lost
    images = entries((1920, 1080, 9))
    buckets = assign_buckets(images, full, patch=2, mode="buckets", min_images=5)
    (lost,) = bucket_warnings(buckets, full, patch=2, min_images=5)
    assert "none has its shape. Add such images, set data.shape=crop, or lower train.batch" in lost


def test_buckets_and_warnings_are_reported_whenever_the_cache_is_opened(tmp_path):
    folder = tmp_path / "in"
    for number in range(3):
        paint(folder / f"{number}.png", "wide", (96, 48))
    paint(folder / "square.png", "square", (64, 64))
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            said = encode(folder, tmp_path / "out", mode="buckets", min_images=2)
        words = [str(w.message) for w in caught]
        assert len([w for w in words if "no image is trained at the full size 16x16" in w]) == 1
        assert len([w for w in words if "1 image is cropped" in w and "16x16 (1)" in w]) == 1
        (line,) = said
        assert line.startswith(f"{folder}: 1 aspect bucket: 12x22 keeps 4 images and ")
    assert encode(folder, tmp_path / "cropped") == []  # crop has no buckets


def test_a_folder_is_encoded_again_when_a_linked_image_changes(tmp_path):
    paint(tmp_path / "store" / "a.png", "a")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "store")
    encode(tmp_path / "in", tmp_path / "out")
    stamp = os.stat(tmp_path / "out" / "16x16" / "set.json").st_mtime_ns
    encode(tmp_path / "in", tmp_path / "out")
    assert os.stat(tmp_path / "out" / "16x16" / "set.json").st_mtime_ns == stamp
    paint(tmp_path / "store" / "b.png", "b")
    encode(tmp_path / "in", tmp_path / "out")
    assert os.stat(tmp_path / "out" / "16x16" / "set.json").st_mtime_ns != stamp
