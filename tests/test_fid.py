"""FID: the authors' protocol, and that it runs where torch-fidelity is installed without torchvision."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from scalewise.config.presets import find_recipe
from scalewise.evaluation.scoring import ScoringOptions, load_scorers
from scalewise.metrics.features import Inception, _inception_module, fid_square

NAME = "torch_fidelity.feature_extractor_inceptionv3"


def images(count: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inception with random weights, as a file."""
    library = _inception_module()
    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patched:
        torch.manual_seed(3)
        patched.setattr(library, "load_state_dict_from_url", lambda *_, **__: {})
        patched.setattr(torch.nn.Module, "load_state_dict", lambda self, state: None)
        network = library.FeatureExtractorInceptionV3("random", ["2048"])
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path)
    return path


def test_images_are_brought_to_256_by_lanczos_and_cropped_in_the_center() -> None:
    [wide] = images(1, (300, 515))
    resized = Image.fromarray(wide).resize((439, 256), Image.Resampling.LANCZOS)  # int(256 * 515 / 300)
    wanted = np.asarray(resized)[:, 92 : 92 + 256]  # round(91.5) is 92
    assert np.array_equal(fid_square(wide), wanted)
    [square] = images(1, (256, 256))
    assert np.array_equal(fid_square(square), square)


def test_what_is_finer_than_inception_sees_does_not_alias() -> None:
    """Stripes of 3 pixels at 1,024: none are left, where resizing in the network alone leaves strong ones."""
    stripes = np.zeros((1024, 1024, 3), dtype=np.uint8)
    stripes[:, ::3] = 255
    library = _inception_module()
    pixels = torch.from_numpy(stripes).permute(2, 0, 1)[None].float()
    alone = library.interpolate_bilinear_2d_like_tensorflow1x(pixels, size=(299, 299), align_corners=False)
    assert float(alone.std()) > 50
    assert fid_square(stripes)[8:-8, 8:-8].std() < 2


def test_fid_takes_inception_from_a_safetensors_file(weights: Path) -> None:
    found, drawn = Inception.load(str(weights), "cpu"), images(2, (300, 515))
    squares = np.stack([fid_square(image) for image in drawn])
    with torch.no_grad():
        wanted = found.network(torch.from_numpy(squares).permute(0, 3, 1, 2))[0]
    together = found.extract(drawn, ["", ""])["fid"]
    alone = torch.cat([found.extract(drawn[i : i + 1], [""])["fid"] for i in range(2)])
    assert together.shape == (2, 2048)
    assert torch.allclose(together, wanted, rtol=1e-4, atol=1e-6)
    assert torch.allclose(together, alone, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match=r"must end in \.safetensors; convert other weights once"):
        Inception.load("weights.pth", "cpu")


def test_fid_runs_without_torchvision_in_a_fresh_process(weights: Path, tmp_path: Path) -> None:
    """As after `make venv`, which installs torch-fidelity and no torchvision."""
    np.save(tmp_path / "drawn.npy", images(2, (32, 32)))
    program = (
        "import sys; sys.modules['torchvision'] = None\n"
        "import numpy as np\n"
        "from scalewise.metrics.features import Inception\n"
        f"drawn = np.load({str(tmp_path / 'drawn.npy')!r})\n"
        f"found = Inception.load({str(weights)!r}, 'cpu').extract(drawn, ['', ''])\n"
        "print(tuple(found['fid'].shape), bool(found['fid'].isfinite().all()))\n"
        "print('torch_fidelity' in sys.modules)"  # a stand-in left there would break who imports the package
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["(2, 2048) True", "False"], done.stderr


def test_real_and_drawn_images_are_prepared_alike(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCALEWISE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "real").mkdir()
    real = images(3, (40, 60))
    for number, image in enumerate(real):
        Image.fromarray(image).save(tmp_path / "real" / f"{number}.png")
    judge = load_scorers(
        find_recipe("mini"), ScoringOptions(metrics=(f"fid={weights}",), reference=tmp_path / "real")
    )
    drawn = Inception.load(str(weights), "cpu").extract(real, [""] * 3)["fid"]
    assert judge.real is not None
    assert torch.allclose(judge.real["fid"].mean, drawn.double().mean(0), rtol=1e-3, atol=1e-5)


def test_fid_without_its_package_names_the_line_that_installs_it_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torchvision, on which the package depends, would bring another torch."""
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match=r"pip install --no-deps torch-fidelity$"):
        Inception.load("torch-fidelity", "cpu")
