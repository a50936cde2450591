"""Recipes: values that survive YAML, take dotted overrides, and refuse what cannot be meant."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from scalewise import mini
from scalewise.cli.arguments import split_overrides
from scalewise.config.overrides import field_names, nearest
from scalewise.config.presets import RECIPES, find_recipe
from scalewise.config.recipe import Recipe, RecipeError
from scalewise.method.loss_config import LossRecipe, MmdRecipe, Timesteps
from scalewise.method.scales import ScaleSchedule
from scalewise.training.origin import describe_difference


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.from_mapping(
        {"name": "test", "schedule": {"timesteps": [1000.0, 895.9, 602.15], "scales": ["8", "8x12", "16x24"]}}
    )


def test_a_recipe_survives_yaml(recipe, tmp_path):
    changed = recipe.override(
        [
            'about=Grün: "quoted" # and so on',
            "optimizer.lr=3e-4",
            "train.ema=0.98",
            "lora.targets=[to_q, net.2]",
        ]
    )
    assert changed.about == 'Grün: "quoted" # and so on'
    assert changed.optimizer.lr == 3e-4
    path = tmp_path / "recipe.yaml"
    path.write_text(changed.to_yaml(), encoding="utf-8")
    assert Recipe.from_yaml(path) == changed
    assert Recipe.from_yaml(path) != recipe


def test_every_field_of_a_recipe_is_written(recipe):
    text = recipe.to_yaml()
    assert all(f"{name.split('.')[-1]}:" in text for name in field_names(Recipe))


def test_a_recipe_builds_its_schedule(recipe):
    assert recipe.schedule.build() == ScaleSchedule.build([1000, 895.9, 602.15], ["8x8", "8x12", "16x24"])
    full = recipe.override(["schedule.full_scale=true"]).schedule.build()
    assert [str(scale) for scale in full.scales] == ["16x24"] * 3


def test_the_mini_is_resolved_in_the_recipe_and_other_places_stay(recipe):
    own = recipe.override(["model.base=mini", "data.path=mini"])
    assert (own.model.folder, own.data.folder) == (str(mini.TEACHER), mini.DATA)
    assert own.model.is_mini and own.data.is_mini and own.model.base == "mini"
    other = recipe.override(["model.base=some/base", "data.path=sets/a"])
    assert (other.model.folder, str(other.data.folder)) == ("some/base", "sets/a")
    assert not other.model.is_mini and not other.data.is_mini


def test_dotted_overrides_set_just_their_field(recipe):
    changed = recipe.override(
        ["train.iterations=200", "loss.dmd.weight=0", "lora.targets=[to_q, to_k]",
         "optimizer.betas=[0.9, 0.99]", "schedule.scales=[8, 8x16, 16x24]",
        "model.max_sequence_length=null", "about=a = b"]
    )  # fmt: skip
    assert changed.train.iterations == 200
    assert changed.loss.dmd.weight == 0
    assert changed.lora.targets == ("to_q", "to_k")
    assert changed.optimizer.betas == (0.9, 0.99)
    assert changed.about == "a = b"
    before, after = recipe.model_dump(), changed.model_dump()
    assert after["train"] | {"iterations": 3000} == before["train"]
    assert after["loss"]["gan"] == before["loss"]["gan"]
    assert recipe.train.iterations == 3000  # the recipe itself is a value


@pytest.mark.parametrize("text", [
    "/data/shoot #2", "2024-01-01", "123", "no", "null", "1.10", "a: b", "*x", "@x", "%50", "[a]", "'a'",
    " a ",
])  # fmt: skip
def test_a_key_that_holds_text_takes_it_as_typed_and_keeps_it_in_a_file(recipe, tmp_path, text):
    keys = ("data.path", "teacher.negative_prompt", "name", "about", "model.base")
    changed = recipe.override([f"{key}={text}" for key in keys])
    held = (changed.data.path, changed.teacher.negative_prompt, changed.name, changed.about)
    assert (*held, changed.model.base) == (text,) * 5
    (tmp_path / "recipe.yaml").write_text(changed.to_yaml(), encoding="utf-8")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == changed


def test_nothing_behind_the_sign_is_an_empty_text_and_no_path(recipe):
    assert recipe.override(["teacher.negative_prompt="]).teacher.negative_prompt == ""
    with pytest.raises(RecipeError, match=r"data\.path = '': String should have at least 1 character"):
        recipe.override(["data.path="])


@pytest.mark.parametrize(("text", "vae"), [("null", None), ("", None), ("./null", "./null"), ("no", "no")])
def test_a_text_key_that_may_be_empty_is_so_by_null_or_nothing(recipe, text, vae):
    assert recipe.override(["model.vae=taesd3", f"model.vae={text}"]).model.vae == vae


def test_every_element_of_a_list_of_texts_is_text(recipe):
    changed = recipe.override(["train.sample_prompts=[no, 1.10, 2024-01-01, null]", "lora.targets=[123]"])
    assert changed.train.sample_prompts == ("no", "1.10", "2024-01-01", "null")
    assert changed.lora.targets == ("123",)
    assert changed.override(["lora.targets=null"]).lora.targets is None


def test_numbers_are_decimal_and_truths_are_words(recipe):
    changed = recipe.override(["train.batch=010", "optimizer.lr=3e-4", "schedule.full_scale=yes"])
    assert (changed.train.batch, changed.optimizer.lr, changed.schedule.full_scale) == (10, 3e-4, True)
    for wrong in ("train.batch=1:30", "train.batch=yes", "optimizer.lr=inf", "optimizer.lr=nan"):
        with pytest.raises(RecipeError, match=wrong.partition("=")[0]):
            recipe.override([wrong])


def test_the_last_of_two_overrides_of_one_field_holds(recipe):
    assert recipe.override(["train.batch=2", "train.batch=3"]).train.batch == 3


@pytest.mark.parametrize(
    ("assignment", "parts"),
    [
        ("train.iteration=5", "Unknown recipe key 'train.iteration'; did you mean 'train.iterations'"),
        ("loss.mmd.wieght=5", "Unknown recipe key 'loss.mmd.wieght'; did you mean 'loss.mmd.weight'"),
        ("lr=5", "Unknown recipe key 'lr'; did you mean 'optimizer.lr'"),
        ("train.batch.size=5", "Unknown recipe key 'train.batch.size'; did you mean 'train.batch'"),
        ("zzzzzzzz=1", "Unknown recipe key 'zzzzzzzz'; known are: name, about, model.base"),
        ("loss.mmd=3", "'loss.mmd' is a group of keys; set one of loss.mmd.weight, loss.mmd.kernel"),
        ("loss.mmd={weight: 2}", "'loss.mmd' is a group of keys; set one of loss.mmd.weight"),
        ("train=null", "'train' is a group of keys; set one of train.iterations"),
        ("train.iterations", "'train.iterations' must have the form key=value, as in train.iterations=200"),
        ("train.iterations=[1", r"'train.iterations=\[1' has an invalid value"),
        ("train.iterations=0", "train.iterations = 0: Input should be greater than or equal to 1"),
        ("train.iterations=many", "train.iterations = 'many': Input should be a valid integer"),
        ("train.ema=1", "train.ema = 1: Input should be less than 1"),
        ("loss.mmd.penalty=l2", "loss.mmd.penalty = 'l2': Input should be 'squared', 'huber' or 'abs'"),
        ("loss.dmd.guidance=0.5", "loss.dmd.guidance = 0.5: Input should be greater than or equal to 1"),
        ("schedule.scales=[8, 8]", "schedule: Got 3 timesteps and 2 scales; the lengths must match"),
        ("schedule.scales=[8, 16, 8x24]", "schedule: Scale 8x24 follows 16x16; .* at least 16x24"),
        ("schedule.timesteps=[1000, 600, 895]", "schedule: Timestep 895 follows 600"),
        ("loss.mmd.timesteps.low=700", "loss.mmd.timesteps: low 700 must be below high 600"),
        ("loss.dmd.timesteps.low=790.4", r"no timestep of the 28-step schedule lies in \[790.4, 790.5\]"),
    ],
)  # fmt: skip
def test_a_bad_override_is_refused_with_what_would_be_right(recipe, assignment, parts):
    with pytest.raises(RecipeError, match=parts):
        recipe.override([assignment])


def test_an_unknown_key_of_a_file_is_refused_with_the_nearest(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml().replace("iterations:", "iteratons:"))
    with pytest.raises(
        RecipeError, match=r"recipe\.yaml: unknown key 'train\.iteratons'; did you mean 'train\.iterations'"
    ):
        Recipe.from_yaml(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must contain a mapping"),
        ("", "must contain a mapping"),
        ("name: [", "Cannot read the recipe file"),
        ("name: x\n", "schedule: Field required"),
        ("name: x\nschedule: 3\n", "schedule = 3"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as raised:
        Recipe.from_yaml(path)
    assert str(path) in str(raised.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"Cannot read the recipe file: .*missing\.yaml"):
        Recipe.from_yaml(tmp_path / "missing.yaml")


def test_recipes_cannot_be_changed_in_place(recipe):
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.iterations = 5


@pytest.mark.parametrize(
    ("weights", "fake", "head"),
    [((1, 1, 1), True, True), ((1, 0, 0), False, False), ((0, 1, 0), True, False), ((0, 0, 1), True, True)],
)
def test_a_fake_model_and_a_head_are_needed_by_dmd_and_gan_alone(weights, fake, head):
    mmd, dmd, gan = ({"weight": weight} for weight in weights)
    loss = LossRecipe.model_validate({"mmd": mmd, "dmd": dmd, "gan": gan})
    assert (loss.needs_fake, loss.needs_head) == (fake, head)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("loss.mmd.weight=0", "all loss weights are 0; set the weight of mmd, dmd or gan"),
        ("loss.mmd.features=fake", "would train a fake model for MMD alone; use teacher"),
    ],
)
def test_a_loss_that_makes_no_sense_is_refused(recipe, assignment, message):
    with pytest.raises(RecipeError, match=message):
        recipe.override(["loss.dmd.weight=0", "loss.gan.weight=0", assignment])


def test_the_released_levels_of_mmd_are_entries_18_to_27_of_the_28_step_schedule():
    levels = Timesteps(draw="schedule", high=603)
    assert [round(t) for t in levels.entries()] == [602, 561, 515, 465, 409, 347, 278, 200, 111, 9]


def test_the_released_levels_of_dmd_end_at_790_and_those_of_the_fake_model_at_1000():
    dmd, fake = LossRecipe().dmd.timesteps.entries(), LossRecipe().fake.timesteps.entries()
    assert (len(dmd), round(dmd[0])) == (16, 790)
    assert (len(fake), fake[0]) == (28, 1000.0)
    assert fake[12:] == dmd


def test_the_papers_levels_of_mmd_are_drawn_uniformly_from_0_to_600():
    levels = MmdRecipe().timesteps
    assert (levels.draw, levels.low, levels.high, levels.entries()) == ("uniform", 0, 600, ())


def test_the_nearest_word_is_offered_or_else_all_there_are():
    assert nearest("mini-mdm", ["mini", "mini-mmd"]) == "did you mean 'mini-mmd'?"
    assert nearest("qqq", ["mini", "mini-mmd"]) == "known are: mini, mini-mmd."


def test_recipes_that_share_a_set_agree_on_its_scales():
    scales: dict[str, set[str]] = {}
    for name in RECIPES:
        recipe = find_recipe(name)
        mine = {str(s) for s in recipe.schedule.build().scales}
        shared = scales.setdefault(recipe.data.path, mine)
        assert mine == shared or recipe.model.base == "mini", name


def test_mmd_alone_is_one_override_and_leaves_the_rest():
    for name in RECIPES:
        recipe = find_recipe(name)
        alone = recipe.override(["loss.mmd_only=true"])
        assert not alone.loss.needs_fake and not alone.loss.needs_head
        assert alone.loss.mmd.features == "teacher" and alone.loss.mmd.weight == recipe.loss.mmd.weight
        assert Recipe.from_mapping(alone.model_dump(mode="json")) == alone


def test_words_behind_a_recipe_are_overrides_or_samplers():
    words = ["teacher:4", "model.base=a=b", "mine=student:runs/a", "v1.0=teacher", "name=teacher", "a.b=c"]
    samplers, overrides = split_overrides(words, None)
    assert samplers == ["teacher:4", "mine=student:runs/a", "v1.0=teacher", "name=teacher"]
    assert overrides == ["model.base=a=b", "a.b=c"]
    with pytest.warns(UserWarning, match="--set is deprecated; write key=value without it"):
        assert split_overrides(["teacher"], ["train.batch=2"]) == (["teacher"], ["train.batch=2"])


def test_recipes_that_call_the_timesteps_levels_are_read_as_before(recipe):
    values = recipe.model_dump(mode="json")
    old = json.loads(json.dumps(values).replace('"timesteps": {', '"levels": {'))
    assert old["loss"]["mmd"]["levels"] and old != values
    assert Recipe.from_mapping(old) == recipe


def test_the_difference_of_two_recipes_is_the_first_in_their_order(recipe):
    changed = recipe.override(["train.seed=3", "lora.rank=8", "optimizer.clip=2"])
    difference = describe_difference(
        recipe.model_dump(mode="json"), changed.model_dump(mode="json"), free=["about"]
    )
    assert difference.startswith("lora.rank is 64")
