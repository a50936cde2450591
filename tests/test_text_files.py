"""User-supplied text files: prompt formats, encodings of recipes, and an explicit encoding in every call."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from scalewise.cli.inputs import read_prompts
from scalewise.config.presets import find_recipe
from scalewise.config.recipe import Recipe, RecipeError
from scalewise.data import DataError
from scalewise.data.prompts import read_prompt_file

ROOT = Path(__file__).parents[1]
WANTED = ["a red apple", 'a dog, "Rex"', "ein Bär"]


def text_calls_without_encoding(tree: ast.AST) -> list[int]:
    """Return the lines of calls that read or write text in the platform's default encoding."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {keyword.arg for keyword in node.keywords}
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        modes += [
            k.value.value for k in node.keywords if k.arg == "mode" and isinstance(k.value, ast.Constant)
        ]
        is_mode = any(set(mode) <= set("rwaxbt+") for mode in modes)
        reads_text = {
            "read_text": not node.args,
            "write_text": len(node.args) < 2,
            "open": (isinstance(node.func, ast.Name) or is_mode) and not any("b" in m for m in modes),
            "fdopen": not any("b" in m for m in modes),
        }.get(name, False)
        piped = name in ("run", "Popen", "check_output") and "text" in given
        if "encoding" not in given and (reads_text or piped):
            found.append(node.lineno)
    return found


def test_every_call_that_reads_or_writes_text_names_its_encoding():
    files = [*ROOT.glob("src/**/*.py"), *ROOT.glob("scripts/**/*.py")]
    trees = {f: ast.parse(f.read_text(encoding="utf-8")) for f in files}
    assert {
        str(f.relative_to(ROOT)): n for f, t in trees.items() if (n := text_calls_without_encoding(t))
    } == {}
    wrong = "p.read_text()\np.write_text(s)\nopen(p)\np.open('a')\nrun(c, text=True)\n"
    wrong += "open(p, 'rb')\nImage.open(p)"
    assert text_calls_without_encoding(ast.parse(wrong)) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("name", "text"), [
    ("lines.txt", "a red apple\r\n\r\na dog, \"Rex\"\nein Bär"),
    ("lines", "a red apple\n  a dog, \"Rex\" \nein Bär\n"),
    ("geneval.jsonl", "".join(json.dumps({"tag": "x", "prompt": p}) + "\n" for p in WANTED)),
    ("texts.jsonl", "\n".join(json.dumps(p) for p in WANTED)),
    ("list.json", json.dumps(WANTED)),
    ("objects.json", json.dumps([{"id": 1, "Caption": p} for p in WANTED])),
    ("named.json", json.dumps({"prompts": WANTED, "version": 2})),
    ("mjhq.json", json.dumps({str(i): {"category": "x", "prompt": p} for i, p in enumerate(WANTED)})),
    ("drawbench.csv", 'Prompts,Category\na red apple,x\n"a dog, ""Rex""",y\nein Bär,z\n'),
    ("parti.tsv", 'Prompt\tCategory\na red apple\tx\n"a dog, ""Rex"""\ty\nein Bär\tz\n'),
])  # fmt: skip
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_prompt_files_of_every_format_give_the_same_prompts(tmp_path, name, text, mark):
    (tmp_path / name).write_bytes((mark + text).encode())
    assert read_prompts(tmp_path / name, "mini", "test") == WANTED


def test_a_quotation_mark_at_the_start_of_a_tsv_prompt_is_kept(tmp_path):
    (tmp_path / "parti.tsv").write_text('Prompt\tNote\n"EAT" on a wall\tx\na cat\ty\n', encoding="utf-8")
    assert read_prompt_file(tmp_path / "parti.tsv") == ['"EAT" on a wall', "a cat"]


@pytest.mark.parametrize("sign", ["\f", "\v", "\x1c", "\x85", "\u2028", "\u2029"])
def test_a_page_or_line_separator_within_a_line_does_not_split_the_prompt(tmp_path, sign):
    (tmp_path / "p.txt").write_text(f"a red{sign}apple\na dog{sign}\n", encoding="utf-8")
    assert read_prompt_file(tmp_path / "p.txt") == ["a red apple", "a dog"]


@pytest.mark.parametrize(("name", "text", "said"), [
    ("p.txt", '{"prompt": "a"}\n', "contains JSON; rename it to end in .jsonl"),
    ("p.txt", '[\n"a"\n]', "contains JSON; rename it to end in .jsonl"),
    ("p.jsonl", '{"prompt": "a"}\n{"tag": "b"}\n', "line 2, has the fields tag, but needs one of prompt, "),
    ("p.jsonl", '{"prompt": "a"}\n{"prompt"\n', "line 2, is not valid JSON"),
    ("p.jsonl", '{"prompt": 3}\n', "line 1, has a prompt that is not text, 3"),
    ("p.json", '{"train": ["a"], "test": ["b"]}', "has 2 lists"),
    ("p.json", "3", "must contain a list of prompts"),
    ("p.csv", "a red apple\na dog\n", "columns a red apple, but .* prompt, .*; rename the prompt column"),
    ("p.csv", "prompt,id\na red, round apple,1\n", "row 2, does not have as many columns as the header"),
    ("p.csv", "", "has the columns none, but needs one of prompt"),
    ("p.parquet", "", "has an unsupported format"),
    ("p.yaml", "- a", "has an unsupported format"),
])  # fmt: skip
def test_an_invalid_prompt_file_is_rejected_with_the_reason(tmp_path, name, text, said):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=said) as raised:
        read_prompt_file(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_recipe_or_prompt_file_in_another_encoding_is_named_with_the_remedy(tmp_path, encoding):
    text = find_recipe("mini").override(["about=Grün"]).to_yaml()
    for name in ("mine.yaml", "prompts.txt"):
        (tmp_path / name).write_text(text, encoding=encoding)
    said = (
        r" is UTF-16 text \(the default of PowerShell's `>`\)"
        if encoding == "utf-16"
        else " is not UTF-8 text"
    )
    with pytest.raises(RecipeError, match=r"mine\.yaml" + said):
        Recipe.from_yaml(tmp_path / "mine.yaml")
    with pytest.raises(DataError, match=r"prompts\.txt" + said):
        read_prompt_file(tmp_path / "prompts.txt")


def test_a_recipe_with_a_byte_order_mark_is_read(tmp_path):
    recipe = find_recipe("mini")
    (tmp_path / "mine.yaml").write_text(recipe.to_yaml(), encoding="utf-8-sig")
    assert Recipe.from_yaml(tmp_path / "mine.yaml") == recipe


@pytest.mark.parametrize(("content", "said"), [
    ("a dog\n".encode("utf-16-le"), "has NUL characters, as UTF-16 and binary files do; save it as UTF-8"),
    ("a dog\n".encode("utf-16-be"), "has NUL characters"),
    (b"a\x00dog\n", "has NUL characters"),
    ("a dog\n".encode("utf-32"), "is UTF-32 text; save it as UTF-8"),
    ("a dog\n".encode("utf-16"), r"is UTF-16 text \(the default of PowerShell"),
    (b"PK\x03\x04 docx", r"is not a text file but a ZIP archive, such as \.docx, .*; save its text as UTF-8"),
    (b"\x1f\x8b gz", "is not a text file but compressed with gzip"),
    (b"\x89PNG\r\n", "is not a text file but a PNG image"),
])  # fmt: skip
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".docx", ""])
def test_files_that_are_not_utf8_text_are_rejected_with_the_remedy(tmp_path, content, said, suffix):
    (tmp_path / f"p{suffix}").write_bytes(content)
    with pytest.raises(DataError, match=said) as raised:
        read_prompt_file(tmp_path / f"p{suffix}")
    assert str(tmp_path / f"p{suffix}") in str(raised.value)


def test_line_ends_of_every_system_are_read(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"a dog\ra cat\r\na fish\n")
    assert read_prompt_file(tmp_path / "p.txt") == ["a dog", "a cat", "a fish"]


@pytest.mark.parametrize("name", ["p.json", "p.jsonl", "p.txt"])
def test_deeply_nested_json_is_refused_in_one_sentence(tmp_path, name):
    (tmp_path / name).write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(DataError, match=r"nested too deeply; give a list|contains JSON; rename it"):
        read_prompt_file(tmp_path / name)


@pytest.mark.parametrize("field", ["prompt", "text", "Caption"])
def test_one_object_with_a_prompt_is_one_prompt(tmp_path, field):
    (tmp_path / "p.json").write_text(json.dumps({"id": "x", field: "a dog", "negative": "blurry"}))
    assert read_prompt_file(tmp_path / "p.json") == ["a dog"]


@pytest.mark.parametrize(("value", "keys"), [
    ({"id": "x", "negative": "blurry"}, "id, negative"), ({}, "none"),
    ({"a": "b", "c": {"prompt": "d"}}, "a, c"),
    ({f"k{i}": "v" for i in range(10)}, "k0, k1, k2, k3, k4, k5, k6, k7 and 2 more"),
])  # fmt: skip
def test_an_object_without_a_prompt_is_rejected_with_its_keys(tmp_path, value, keys):
    (tmp_path / "p.json").write_text(json.dumps(value))
    with pytest.raises(DataError, match=f"with the keys {keys}, but needs one of prompt, .*a list of"):
        read_prompt_file(tmp_path / "p.json")
