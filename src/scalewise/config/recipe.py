"""A run as a value: frozen pydantic models, extra fields forbidden, read from and written to YAML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from scalewise.common.errors import first_line
from scalewise.common.paths import expand_home
from scalewise.common.text_files import TextFileError, read_utf8
from scalewise.config.overrides import about_of, field_names, field_type, nearest, read_value
from scalewise.method.loss_config import Frozen, LossRecipe
from scalewise.method.scales import ScaleSchedule


class RecipeError(ValueError):
    """A recipe, a file of one or an override that cannot be used; the message says what to write instead."""


PathText = Annotated[str, AfterValidator(expand_home)]
"""A path, or a name of the hub; "~" is the home folder."""


class ModelRecipe(Frozen):
    """The teacher to distil."""

    base: PathText = Field(
        "mini", min_length=1, description="'mini', a folder in diffusers' layout, or a hub id"
    )
    family: str | None = Field(
        None, description="sd3, flux, sdxl or wan: bases of others are refused; None = any"
    )
    variant: str | None = Field(
        None, description="which weights of the base, such as fp16; None = the plain ones, or what is there"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantize: Literal["none", "int8", "nf4"] = Field(
        "none", description="bits of the frozen base's linear layers, also in drawing (needs bitsandbytes)"
    )
    offload_text: bool = Field(
        False, description="keep text encoders in main memory, and bring each to the GPU while it encodes"
    )
    offload: Literal["none", "components", "blocks"] = Field(
        "none",
        description="in drawing and encoding, weights rest in main memory and come to the GPU as they run",
    )
    max_sequence_length: int | None = Field(
        None, ge=1, description="T5 tokens; None = the family's usual number"
    )
    vae: PathText | None = Field(
        None, description="another autoencoder of the same latents, such as a tiny one; null = the base's"
    )
    embedded_guidance: float | None = Field(
        None, ge=1, description="what a model with guidance as an input (FLUX) is told; None = the family's"
    )


class TeacherRecipe(Frozen):
    """How the teacher samples: the synthetic set, and the baseline that students are compared with."""

    steps: int = Field(28, ge=1)
    guidance: float = Field(4.5, ge=1, description="classifier-free guidance, or FLUX's embedded; 1 = none")
    negative_prompt: str = Field(
        "", description="what guidance leads away from, in sampling and in DMD's teacher"
    )
    shift: float | None = Field(
        None, gt=0, description="shift of the flow-matching schedule it samples with; None = the base's own"
    )
    max_sequence_length: int | None = Field(
        None,
        ge=1,
        description="T5 tokens when it samples; None = as the family's own pipeline (SD3.5: 256)",
    )


class ScheduleRecipe(Frozen):
    """Timesteps (1000 x sigma, falling) paired with latent scales ("16", "16x24" or "21x60x104")."""

    timesteps: tuple[float, ...]
    scales: tuple[Annotated[str, Field(coerce_numbers_to_str=True)], ...]  # YAML reads 16 as a number
    full_scale: bool = Field(False, description="work at the last scale in every step (the baseline)")

    def build(self) -> ScaleSchedule:
        """Return the schedule, at full scale if asked for."""
        schedule = ScaleSchedule.build(self.timesteps, self.scales)
        return schedule.at_full_scale() if self.full_scale else schedule

    @model_validator(mode="after")
    def _builds(self) -> ScheduleRecipe:
        self.build()
        return self


class LoraRecipe(Frozen):
    """Adapters on the frozen base, one for each trained role."""

    rank: int = Field(64, ge=1)
    alpha: float | None = Field(None, description="None = the rank, as released")
    targets: tuple[str, ...] | None = Field(None, description="module names; None = the family's")

    @model_validator(mode="after")
    def _some_target(self) -> LoraRecipe:
        if self.targets is not None and not all((self.targets, *self.targets)):
            raise ValueError(f"targets {list(self.targets)} name no module; leave them out for the family's")
        return self


class DataRecipe(Frozen):
    """Latents and captions to train on."""

    path: PathText = Field(
        "mini", min_length=1, description="'mini', a set made by `scalewise generate`, or a folder of images"
    )
    downscale: Literal["pixel", "latent"] = Field("pixel", description="latent: the ablation of section 4.1")
    reencode: bool = Field(
        False,
        description="for `scalewise generate`: encode the full scale again from pixels too, as released, "
        "instead of keeping the teacher's own latents",
    )
    shape: Literal["crop", "buckets"] = Field(
        "crop", description="how images that are not of the full size are cut"
    )
    caption_from_name: bool = Field(
        False, description="take an image's file name for its caption if it has none"
    )


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerRecipe(Frozen):
    """AdamW, the same for the student and the fake model."""

    lr: float = Field(4e-6, gt=0)
    fake_lr: float | None = Field(None, gt=0, description="None = lr")
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(10.0, gt=0)
    warmup: int = Field(0, ge=0, description="iterations over which the rate rises")


class TrainRecipe(Frozen):
    """The loop."""

    iterations: int = Field(3000, ge=1, description="student updates")
    batch: int = Field(16, ge=1, description="samples a process takes at once")
    accumulate: int = Field(1, ge=1, description="batches whose gradients are averaged before each update")
    seed: int = Field(0, ge=0, lt=2**63 - 1)  # torch's are signed numbers of 64 bits; the next one is used
    precision: Literal["auto", "float32", "bf16"] = Field(
        "auto", description="bf16 = autocast; auto = bf16 where the device multiplies it natively"
    )
    gradient_checkpointing: bool = False
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of the student's average; None = no average"
    )
    checkpoint_every: int = Field(100, ge=1, description="iterations between checkpoints")
    keep_checkpoints: int = Field(2, ge=1)
    sample_every: int = Field(0, ge=0, description="iterations between sample grids; 0 = only at the end")
    sample_prompts: tuple[str, ...] = ()
    step_choice: Literal["round-robin", "sampled"] = Field(
        "round-robin", description="how the schedule's step is picked"
    )


class Recipe(Frozen):
    """Everything that decides a run."""

    name: str
    about: str = ""
    model: ModelRecipe = ModelRecipe()
    teacher: TeacherRecipe = TeacherRecipe()
    schedule: ScheduleRecipe
    lora: LoraRecipe = LoraRecipe()
    loss: LossRecipe = LossRecipe()
    data: DataRecipe = DataRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    train: TrainRecipe = TrainRecipe()

    def to_yaml(self) -> str:
        """Return the whole recipe as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_mapping(cls, values: Any, *, origin: str = "recipe") -> Recipe:
        """Validate a nested mapping; unknown keys are refused with the nearest known one."""
        if not isinstance(values, dict):
            raise RecipeError(f"{origin} does not hold a mapping of recipe fields.")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise RecipeError(f"{origin}: " + "; ".join(_explain(e) for e in error.errors())) from None

    @classmethod
    def from_yaml(cls, path: Path) -> Recipe:
        """Read a recipe file."""
        try:
            return cls.from_mapping(yaml.safe_load(read_utf8(path)), origin=str(path))
        except TextFileError as error:
            raise RecipeError(f"Cannot read the recipe file: {error}") from None
        except yaml.YAMLError as error:
            raise RecipeError(f"Cannot read the recipe file {path}: {error}") from None

    def override(self, assignments: str | Sequence[str] | Mapping[str, Any]) -> Recipe:
        """Apply dotted overrides: "train.iterations=200", several of them, or {"train.iterations": 200}.

        A key that takes a string gets the text as typed; others read numbers and YAML lists. The values of
        a mapping are taken as they are. Unless `about` is given too, it names the keys that were changed.
        """
        found = dict[str, Any]()
        if isinstance(assignments, Mapping):
            found, assignments = dict(assignments), ()
        for assignment in texts(assignments):
            dotted, sign, text = assignment.partition("=")
            if not sign:
                raise RecipeError(
                    f"Override {assignment!r} needs the form key=value, as in train.iterations=200."
                )
            dotted = dotted.strip()
            try:
                found[dotted] = read_value(text, field_type(Recipe, dotted))
            except yaml.YAMLError as error:
                raise RecipeError(
                    f"Override {assignment!r} has a value that cannot be read ({first_line(error)}); a list "
                    "needs quotes around all of it, as in 'lora.targets=[to_q, to_k]'."
                ) from None
        changed = self.with_values(found)
        return changed if "about" in found else changed.with_values({"about": about_of(self, changed, found)})

    def with_values(self, given: Mapping[str, Any]) -> Recipe:
        """Replace fields by dotted name; values are taken as they are, paths as text."""
        values = self.model_dump(mode="json")
        for dotted, value in given.items():
            if not isinstance(dotted, str):
                raise RecipeError(f"Recipe key {dotted!r} is no text; write one as in 'train.iterations'.")
            _assign(values, dotted, fspath(value) if isinstance(value, PathLike) else value)
        return Recipe.from_mapping(values, origin="override" if given else "recipe")


def texts(assignments: Any) -> list[str]:
    """Overrides as a list; raises RecipeError for anything but text and lists of it."""
    found = [assignments] if isinstance(assignments, str) or not isinstance(assignments, Iterable) else None
    found = list(assignments) if found is None else found
    if wrong := [text for text in found if not isinstance(text, str)]:
        raise RecipeError(
            f"Override {wrong[0]!r} is no text of the form 'train.iterations=200'; write that, several in a "
            "list, or a mapping {'train.iterations': 200}."
        )
    return found


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    place: Any = values
    for parent in parents:
        place = place.get(parent) if isinstance(place, dict) else None
    if not isinstance(place, dict) or last not in place:
        raise RecipeError(f"Unknown recipe key {dotted!r}; {nearest(dotted, field_names(Recipe))}")
    if isinstance(place[last], dict):  # a mapping too: it would silently reset what it leaves out
        inside = ", ".join(f"{dotted}.{k}" for k in place[last])
        raise RecipeError(f"Recipe key {dotted!r} is a group; set one of {inside}.")
    place[last] = value


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "recipe"
    if error["type"] == "extra_forbidden":
        return f"unknown key {where!r}; {nearest(where, field_names(Recipe))}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("value_error", "missing"):
        return f"{where}: {message}"
    if error["type"] == "tuple_type":
        message += "; write a list with quotes around all of it, as in 'lora.targets=[to_q, to_k]'"
    return f"{where} = {error['input']!r}: {message}"
