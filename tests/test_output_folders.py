"""Output folders of commands: never outside the requested folder, never among other files."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import make_tiny

from scalewise.cli import main
from scalewise.cli.inputs import check_dataset_folder, default_run_folder
from scalewise.config.presets import find_recipe
from scalewise.config.recipe import Recipe, RecipeError
from scalewise.data import LatentSet


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def generate(recipe: Recipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Run `scalewise generate` with two prompts: (exit code, what it printed on one line)."""
    (tmp_path / "tiny.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (tmp_path / "p.txt").write_text("a dog\na cat\n", encoding="utf-8")

    def call(out: Path, count: int) -> tuple[int, str]:
        given = ["generate", tmp_path / "tiny.yaml", "--prompts", tmp_path / "p.txt", "--count", count]
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in (*given, "--out", out)])
        printed = capfd.readouterr()
        return int(ended.value.code or 0), " ".join((printed.out + printed.err).split())

    return call


@pytest.mark.parametrize("name", ["../../x", "..", ".", "", " ", "a/b", "/x", "..\\x", "a\nb", "a\0b"])
def test_a_name_that_leaves_the_runs_folder_is_rejected(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        RecipeError, match=r"cannot be used as a folder in runs/; change it \(name=...\) or give --out"
    ):
        default_run_folder(find_recipe("mini").override([f"name={name}"]))
    if "\0" not in name:
        with pytest.raises(SystemExit) as ended:
            main(["distill", "mini", f"name={name}"])
        assert ended.value.code == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["mini", "my run #2", "..a", "über", "1.10"])
def test_any_other_name_is_a_folder_in_runs(name):
    assert default_run_folder(find_recipe("mini").override([f"name={name}"])) == Path("runs") / name


def test_a_dataset_is_not_generated_among_other_files(generate, tmp_path):
    for number, name in enumerate(("cat.png", "train", "shard-00000.txt")):
        out = tmp_path / str(number)
        (out / name).mkdir(parents=True)
        code, text = generate(out, 2)
        assert code == 1 and f"{out} contains {name}, which does not belong to a dataset; choose" in text
        assert [p.name for p in out.iterdir()] == [name]
    (tmp_path / "0" / "dog.png").touch()
    with pytest.raises(RecipeError, match=r"contains cat\.png and 1 more"):
        check_dataset_folder(tmp_path / "0")


def test_a_smaller_count_on_a_larger_dataset_reports_that_nothing_is_removed(generate, tmp_path):
    text = generate(tmp_path / "set", 6)[1]
    assert f"6 samples in {tmp_path / 'set'}, stored at 8x8" in text and "more than" not in text
    (tmp_path / "set" / ".DS_Store").touch()
    code, text = generate(tmp_path / "set", 4)
    assert code == 0 and f"6 samples in {tmp_path / 'set'}, stored at 8x8" in text
    assert "The dataset already had more" in text
    assert "more than --count 4 samples: none was generated or removed" in text
    assert "training uses all 6. For a smaller dataset use another --out" in text
    assert len(LatentSet.open(tmp_path / "set")) == 6
