"""Image folders: every image is used or reported, at the right size, upright, and encoded once."""

from __future__ import annotations

import csv
import json
import math
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, features

from scalewise.data import (
    DataError,
    ImageEntry,
    LatentSetWriter,
    assign_buckets,
    bucket_sizes,
    encode_folder,
    load_pixels,
    open_sets,
    scan_images,
)
from scalewise.method.scales import Scale

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def paint(
    path: Path, size: tuple[int, int] = (40, 24), caption: str | None = "a picture", **options: object
) -> Path:
    """Save an image of (width, height), red on the left half and blue on the right, with its caption."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", size, RED)
    picture.paste(BLUE, (size[0] // 2, 0, *size))
    picture.save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def entry(width: int, height: int) -> ImageEntry:
    return ImageEntry(Path(f"{width}x{height}.png"), "", width, height)


def close(pixels: torch.Tensor, color: tuple[int, int, int], tolerance: float = 0.05) -> bool:
    """Return whether pixels [3] in [-1, 1] have a color given in 0 to 255."""
    return bool((pixels - (torch.tensor(color) / 127.5 - 1)).abs().max() < tolerance)


def test_every_common_extension_is_read_in_either_case(tmp_path):
    names = [
        "a.jpg",
        "b.JPG",
        "c.jpeg",
        "d.jfif",
        "e.png",
        "f.PNG",
        "g.webp",
        "h.bmp",
        "i.gif",
        "j.tif",
        "k.tiff",
        "l.jpe",
    ]
    names += ["m.avif", "n.AVIF"] if features.check("avif") else []
    for name in names:
        paint(tmp_path / "deep" / name, caption=name)
    entries, skipped = scan_images(tmp_path)
    assert [image.path.name for image in entries] == sorted(names)
    assert [image.caption for image in entries] == sorted(names)
    assert all((image.width, image.height) == (40, 24) for image in entries)
    assert skipped.counts == {} and skipped.summary == f"{len(names)} images used, none skipped"
    for image in entries:
        pixels = load_pixels(image, (24, 40))
        assert close(pixels[:, 12, 4], RED, 0.2) and close(pixels[:, 12, 36], BLUE, 0.2), image.path.name


def test_unusable_images_are_counted_by_reason_and_named(tmp_path):
    paint(tmp_path / "good.png")
    paint(tmp_path / "bare.png", caption=None)
    paint(tmp_path / "blank.png", caption=" \n")
    for name in ("cut.jpg", "cut.png", "cut.webp"):
        path = paint(tmp_path / name, (200, 200))
        os.truncate(path, path.stat().st_size * 2 // 3)
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "phone.HEIC").write_bytes(b"?")
    paint(tmp_path / "latin.png").with_suffix(".txt").write_bytes("é".encode("latin-1"))
    paint(tmp_path / ".thumbnails" / "hidden.png")
    (tmp_path / "notes.md").write_text("no image either")
    entries, skipped = scan_images(tmp_path)
    assert [image.path.name for image in entries] == ["good.png"]
    assert skipped.counts == {
        "without a caption": 2,
        "unreadable": 4,
        "with a caption that is not UTF-8 text": 1,
    }
    assert skipped.summary.startswith("1 image used, 7 skipped: ")
    assert skipped.others == ("1 file is not read: 1 .heic; convert images to JPEG or PNG",)
    assert "2 without a caption (bare.png, blank.png)" in skipped.summary
    assert "4 unreadable (cut.jpg, cut.png, cut.webp, ...)" in skipped.summary


def test_folders_without_usable_images_are_rejected_with_the_reason(tmp_path):
    with pytest.raises(DataError, match=r"There is no folder .*nowhere"):
        scan_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"No usable image in .*: 0 images used, none skipped"):
        scan_images(tmp_path)
    paint(tmp_path / "a.png", caption=None)
    with pytest.raises(DataError, match=r"1 without a caption \(a.png\).*metadata.jsonl"):
        scan_images(tmp_path)


def write_jsonl(folder: Path, rows: list[dict[str, str]]) -> None:
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    )


def write_json(folder: Path, rows: list[dict[str, str]]) -> None:
    (folder / "captions.json").write_text(json.dumps({row["file_name"]: row["text"] for row in rows}))


def write_json_list(folder: Path, rows: list[dict[str, str]]) -> None:
    (folder / "captions.json").write_text(json.dumps(rows))


def write_csv(folder: Path, rows: list[dict[str, str]]) -> None:
    with (folder / "metadata.csv").open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, ["file_name", "caption"])
        table.writeheader()
        table.writerows({"file_name": row["file_name"], "caption": row["text"]} for row in rows)


@pytest.mark.parametrize("write", [write_jsonl, write_json, write_json_list, write_csv])
def test_captions_come_from_metadata_files_too(tmp_path, write):
    paint(tmp_path / "train" / "a.png", caption=None)
    paint(tmp_path / "train" / "sub" / "b.png", caption=None)
    paint(tmp_path / "train" / "c.png", caption="from beside")
    rows = {
        "a.png": 'a "red", \u2028 and\nblue é',
        "sub/b.png": "second",
        "c.png": "unused",
        "gone.png": "third",
    }
    write(tmp_path / "train", [{"file_name": name, "text": words} for name, words in rows.items()])
    entries, skipped = scan_images(tmp_path)
    captions = {image.path.name: image.caption for image in entries}
    assert captions == {"a.png": 'a "red", and blue é', "b.png": "second", "c.png": "from beside"}
    assert skipped.counts == {"named in the metadata but missing": 1}


def test_captions_come_from_names_only_on_request(tmp_path):
    paint(tmp_path / "a_red-blue_flag.png", caption=None)
    paint(tmp_path / "other.png", caption="its own")
    entries, _ = scan_images(tmp_path, caption_from_name=True)
    assert [image.caption for image in entries] == ["a red blue flag", "its own"]
    assert len(scan_images(tmp_path)[0]) == 1


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "x"}\n{"file_name"',
            r"metadata.jsonl, line 2, is not valid JSON",
        ),
        ("metadata.jsonl", '{"name": "a.png"}', r"line 1, has no file_name"),
        ("captions.json", '{"a.png": ["x", "y"]}', r"entry 1, has a caption that is not text"),
        ("captions.json", '"a.png"', r"must hold \{image: caption\}"),
        ("metadata.csv", "image,text\na.png,x\n", r"metadata.csv, row 1, has no file_name"),
    ],
)
def test_bad_metadata_is_reported_with_its_location(tmp_path, name, text, words):
    paint(tmp_path / "a.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        scan_images(tmp_path)


def test_exif_orientation_is_applied_to_pixels_and_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise: the left half is at the top
    paint(tmp_path / "a.jpg", (64, 32), exif=exif, quality=95)
    ((image,), _) = scan_images(tmp_path)
    assert (image.width, image.height) == (32, 64)
    pixels = load_pixels(image, (64, 32))
    assert close(pixels[:, 8, 16], RED) and close(pixels[:, 56, 16], BLUE)


def test_transparency_shows_white_and_other_modes_keep_their_colors(tmp_path):
    for name, mode, color in (("rgba", "RGBA", (255, 0, 0, 0)), ("la", "LA", (0, 0))):
        Image.new(mode, (8, 8), color).save(tmp_path / f"{name}.png")
        assert close(load_pixels(ImageEntry(tmp_path / f"{name}.png", "", 8, 8), (8, 8))[:, 4, 4], WHITE)
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    half.save(tmp_path / "half.png")
    assert close(load_pixels(ImageEntry(tmp_path / "half.png", "", 8, 8), (8, 8))[:, 4, 4], (127, 127, 127))
    indexed = Image.new("P", (8, 8), 0)
    indexed.putpalette([0, 255, 0])
    indexed.save(tmp_path / "p.gif")
    assert close(load_pixels(ImageEntry(tmp_path / "p.gif", "", 8, 8), (8, 8))[:, 4, 4], GREEN)
    Image.new("CMYK", (8, 8), (255, 0, 255, 0)).save(tmp_path / "cmyk.tif")
    assert close(load_pixels(ImageEntry(tmp_path / "cmyk.tif", "", 8, 8), (8, 8))[:, 4, 4], GREEN)
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(tmp_path / "deep.png")
    deep = load_pixels(ImageEntry(tmp_path / "deep.png", "", 8, 8), (8, 8))
    assert deep.shape == (3, 8, 8) and close(deep[:, 4, 4], (127, 127, 127), 0.01)


@pytest.mark.parametrize(
    ("size", "shown"), [((96, 32), (32, 16)), ((32, 96), (32, 16)), ((20, 20), (32, 48))]
)
def test_pixels_cover_the_size_and_are_center_cropped_without_distortion(tmp_path, size, shown):
    """A ramp along each axis must come out with the slope of one uniform scale factor."""
    width, height = size
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, width), np.linspace(0, 255, height)[:, None]
    Image.fromarray(ramp).save(tmp_path / "a.png")
    pixels = load_pixels(ImageEntry(tmp_path / "a.png", "", width, height), shown)
    assert pixels.shape == (3, *shown) and pixels.dtype == torch.float32 and pixels.abs().max() <= 1
    scale = max(shown[0] / height, shown[1] / width)
    inside = pixels[:, 4:-4, 4:-4]
    slopes = inside[0].diff(dim=1).mean(), inside[1].diff(dim=0).mean()
    for slope, side in zip(slopes, (width, height), strict=True):
        assert slope == pytest.approx(2 / (side - 1) / scale, abs=0.0015)  # of 8-bit rounding
    assert inside[0].mean().abs() < 0.02 and inside[1].mean().abs() < 0.02


def test_shrinking_averages_instead_of_skipping_pixels(tmp_path):
    checks = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checks).save(tmp_path / "a.png")
    pixels = load_pixels(ImageEntry(tmp_path / "a.png", "", 512, 512), (16, 16))
    assert pixels.abs().max() < 0.05


def test_buckets_have_about_equal_area_and_fit_the_patch():
    for full, patch in (
        (Scale(1, 16, 16), 2),
        (Scale(1, 128, 128), 2),
        (Scale(1, 90, 160), 2),
        (Scale(1, 64, 64), 1),
    ):
        sizes = bucket_sizes(full, patch)
        assert full in sizes and len({size.width / size.height for size in sizes}) == len(sizes) >= 7
        for size in sizes:
            assert size.height % patch == 0 and size.width % patch == 0
            assert 0.8 < size.cells / full.cells < 1.25


def test_images_go_to_the_bucket_of_their_aspect_and_crop_uses_one_bucket():
    full = Scale(1, 64, 64)
    images = [entry(640, 480), entry(480, 640), entry(1000, 1000), entry(1920, 1080), entry(512, 500)]
    assert assign_buckets(images, full, patch=2) == {full: images}
    buckets = assign_buckets(images, full, patch=2, mode="buckets")
    assert buckets[full] == [images[2], images[4]]
    for size, members in buckets.items():
        for image in members:
            nearest = min(
                abs(math.log(image.width / image.height * s.height / s.width)) for s in bucket_sizes(full, 2)
            )
            assert abs(math.log(image.width / image.height * size.height / size.width)) == nearest
    assert sum(map(len, buckets.values())) == 5 and len(buckets) == 4
    with pytest.raises(DataError, match="Unknown bucket mode 'stretch'"):
        assign_buckets(images, full, patch=2, mode="stretch")


def test_images_of_buckets_too_small_for_a_batch_go_to_the_nearest_other_bucket():
    full = Scale(1, 64, 64)
    images = [entry(500, 500)] * 6 + [entry(640, 480)] * 5 + [entry(1920, 1080)] * 2 + [entry(100, 200)]
    buckets = assign_buckets(images, full, patch=2, mode="buckets", min_images=5)
    assert {str(size): len(members) for size, members in buckets.items()} == {"56x74": 7, "64x64": 7}
    alone = assign_buckets(images[:3], full, patch=2, mode="buckets", min_images=5)
    assert list(alone.values()) == [images[:3]]


class Pixels:
    """An adapter whose VAE is area pooling by 2, so that a latent shows which pixels it came from."""

    base, vae_factor, patch, channels = "fake", 2, 2, 3

    def __init__(self) -> None:
        self.encoded = 0

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self.encoded += 1
        return F.avg_pool2d(pixels, self.vae_factor).square()  # not linear: the order of operations shows


FULL = Scale(1, 16, 16)


def halves(full: Scale) -> list[Scale]:
    return [Scale(1, full.height // 2, full.width // 2), full]


def fill(folder: Path, count: int = 5, size: tuple[int, int] = (80, 40)) -> Path:
    for number in range(count):
        paint(folder / f"{number}.png", (size[0] + 2 * number, size[1]), caption=f"picture {number}")
    return folder


def test_latents_of_every_scale_are_made_by_downscaling_pixels(tmp_path):
    folder, model, seen = fill(tmp_path / "in"), Pixels(), []
    (data,) = encode_folder(
        model,
        folder,
        tmp_path / "out",
        full=FULL,
        vae_key="v",
        scales_for=halves,
        batch=2,
        on_progress=seen.append,
    )
    assert seen == [0, 2, 4, 5] and model.encoded == 6
    assert data.scales == [Scale(1, 8, 8), FULL] and data.captions([3]) == ["picture 3"]
    whole = load_pixels(scan_images(folder)[0][3], (32, 32))[None]
    for scale in data.scales:
        small = F.interpolate(whole, size=(2 * scale.height, 2 * scale.width), mode="area")
        assert torch.equal(data.latents([3], scale), model.encode(small).half().float())


def test_a_folder_is_encoded_once_until_something_changes(tmp_path):
    folder, out, model = fill(tmp_path / "in"), tmp_path / "out", Pixels()

    def encode(scales=halves, vae_key="v"):
        before = model.encoded
        sets = encode_folder(model, folder, out, full=FULL, vae_key=vae_key, scales_for=scales)
        return sets[0], model.encoded - before

    assert encode()[1] == 2 and encode()[1] == 0
    paint(folder / "new.png", (64, 64))
    data, encodings = encode()
    assert len(data) == 6 and encodings == 2
    (folder / "new.txt").write_text("another caption")
    assert encode()[0].captions([5]) == ["another caption"]
    data, encodings = encode(lambda full: [full])
    assert data.scales == [FULL] and encodings == 1
    model.base = "the same files elsewhere"
    assert encode(lambda full: [full])[1] == 0
    assert encode(lambda full: [full], vae_key="another")[1] == 1


def test_an_interrupted_encoding_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(LatentSetWriter.__init__, "__kwdefaults__", {"shard_rows": 2, "dtype": "float16"})
    folder, out = fill(tmp_path / "in"), tmp_path / "out"

    class Cut(Pixels):
        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            if self.encoded == 6:
                raise KeyboardInterrupt
            return super().encode(pixels)

    with pytest.raises(KeyboardInterrupt):
        encode_folder(Cut(), folder, out, full=FULL, vae_key="v", scales_for=halves, batch=1)
    model = Pixels()
    (data,) = encode_folder(model, folder, out, full=FULL, vae_key="v", scales_for=halves, batch=1)
    assert model.encoded == 2 * (5 - 2) and len(data) == 5
    (out / "16x16" / "shard-00001.arrow").unlink()  # the remedy for a corrupt shard
    model = Pixels()
    with pytest.warns(UserWarning, match=r"shard-00001.arrow is missing"):
        (data,) = encode_folder(model, folder, out, full=FULL, vae_key="v", scales_for=halves, batch=1)
    assert model.encoded == 4 and data.unique_captions() == [f"picture {i}" for i in range(5)]


def test_every_bucket_becomes_a_dataset_of_its_size(tmp_path):
    fill(tmp_path / "in", 3, (80, 40))
    paint(tmp_path / "in" / "tall.png", (50, 100))
    sets = encode_folder(
        Pixels(), tmp_path / "in", tmp_path / "out", full=FULL, vae_key="v", scales_for=halves, mode="buckets"
    )
    assert [data.scales[-1].size for data in sets] == [(12, 22), (22, 12)]
    assert [len(data) for data in sets] == [3, 1]
    assert sets[0].latents([0], sets[0].scales[0]).shape == (1, 3, 6, 11)
    assert [len(data) for data in open_sets(tmp_path / "out")] == [3, 1]
    assert [len(data) for data in open_sets(tmp_path / "out" / "12x22")] == [3]
    sets = encode_folder(
        Pixels(),
        tmp_path / "in",
        tmp_path / "out",
        full=FULL,
        vae_key="v",
        scales_for=halves,
        mode="buckets",
        min_images=2,
    )
    assert [len(data) for data in sets] == [4]


def test_skipped_and_enlarged_images_cause_warnings(tmp_path):
    fill(tmp_path / "in", 2)
    paint(tmp_path / "in" / "small.png", (20, 20))
    paint(tmp_path / "in" / "bare.png", caption=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encode_folder(Pixels(), tmp_path / "in", tmp_path / "out", full=FULL, vae_key="v", scales_for=halves)
    words = [str(warning.message) for warning in caught]
    assert any("3 images used, 1 skipped: 1 without a caption (bare.png)" in text for text in words)
    assert any("1 of 3 images are smaller than the training size" in text for text in words)
