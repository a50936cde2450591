"""The configuration of a run: frozen pydantic models, no extra fields, read from and written to YAML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from scalewise import mini
from scalewise.common.errors import first_line
from scalewise.common.paths import expand_home
from scalewise.common.text_files import TextFileError, read_utf8
from scalewise.config.overrides import about_of, field_names, field_type, nearest, read_value
from scalewise.method.loss_config import Frozen, LossRecipe
from scalewise.method.scales import ScaleSchedule


class RecipeError(ValueError):
    """An invalid recipe, recipe file or override; the message says what to write instead."""


PathText = Annotated[str, AfterValidator(expand_home)]
"""A path or a hub id; "~" is the home folder."""


class ModelRecipe(Frozen):
    """The teacher to distill."""

    base: PathText = Field(
        "mini", min_length=1, description="'mini', a folder in the layout of diffusers, or a hub id"
    )
    family: str | None = Field(None, description="required model family: sd3, flux, sdxl or wan; null = any")
    variant: str | None = Field(
        None, description="weight variant of the base, such as fp16; null = the default, or the only one"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="dtype of the base; float16 for sampling only"
    )
    quantize: Literal["none", "int8", "nf4"] = Field(
        "none",
        description="bits of the linear layers of the frozen base, also when sampling (needs bitsandbytes)",
    )
    offload_text: bool = Field(
        False, description="keep text encoders in CPU memory and move each to the GPU while it encodes"
    )
    offload: Literal["none", "components", "blocks"] = Field(
        "none",
        description="when sampling and encoding, keep weights in CPU memory and load them as needed",
    )
    max_sequence_length: int | None = Field(
        None, ge=1, description="T5 tokens; null = the default of the model family"
    )
    vae: PathText | None = Field(
        None, description="another VAE with the same latents, such as a tiny one; null = that of the base"
    )
    embedded_guidance: float | None = Field(
        None,
        ge=1,
        description="guidance value of a model with guidance as an input (FLUX); null = family default",
    )

    @property
    def folder(self) -> str:
        """Folder or hub id of the base, with the mini resolved to its folder."""
        return mini.resolve(self.base, mini.TEACHER)

    @property
    def is_mini(self) -> bool:
        """Whether the base is the embedded mini, which includes captions and a scorer."""
        return mini.is_named(self.base)


class TeacherRecipe(Frozen):
    """Sampling settings of the teacher, for the synthetic dataset and as a baseline in evaluation."""

    steps: int = Field(28, ge=1, description="sampling steps of the teacher")
    guidance: float = Field(
        4.5, ge=1, description="classifier-free guidance scale, or the guidance input of FLUX; 1 = none"
    )
    negative_prompt: str = Field("", description="negative prompt of the teacher, in sampling and in DMD")
    shift: float | None = Field(
        None, gt=0, description="shift of its flow-matching schedule; null = that of the base"
    )
    max_sequence_length: int | None = Field(
        None,
        ge=1,
        description="T5 tokens when it samples; null = as in the diffusers pipeline (SD3.5: 256)",
    )


class ScheduleRecipe(Frozen):
    """Timesteps (1000 x sigma, decreasing) with one latent scale each ("16", "16x24" or "21x60x104")."""

    timesteps: tuple[float, ...] = Field(description="decreasing timesteps in (0, 1000]")
    # YAML reads 16 as a number.
    scales: tuple[Annotated[str, Field(coerce_numbers_to_str=True)], ...] = Field(
        description="non-decreasing latent scales, one per timestep"
    )
    full_scale: bool = Field(False, description="run every step at the last scale (the full-scale baseline)")

    def build(self) -> ScaleSchedule:
        """Return the schedule, at full scale with `full_scale`."""
        schedule = ScaleSchedule.build(self.timesteps, self.scales)
        return schedule.at_full_scale() if self.full_scale else schedule

    @model_validator(mode="after")
    def _builds(self) -> ScheduleRecipe:
        self.build()
        return self


class LoraRecipe(Frozen):
    """LoRA adapters on the frozen base, one for each trained role."""

    rank: int = Field(64, ge=1, description="rank of the LoRA")
    alpha: float | None = Field(None, description="scale of the LoRA; null = same as lora.rank, as released")
    targets: tuple[str, ...] | None = Field(
        None, description="module names; null = those of the model family"
    )

    @model_validator(mode="after")
    def _some_target(self) -> LoraRecipe:
        if self.targets is not None and not all((self.targets, *self.targets)):
            raise ValueError(
                f"targets {list(self.targets)} name no module; omit them for those of the model family"
            )
        return self


class DataRecipe(Frozen):
    """The training dataset."""

    path: PathText = Field(
        "mini",
        min_length=1,
        description="'mini', a dataset made by `scalewise generate`, or a folder of images",
    )
    downscale: Literal["pixel", "latent"] = Field(
        "pixel", description="where images are downscaled; latent = ablation of section 4.1"
    )
    reencode: bool = Field(
        False,
        description="for `scalewise generate`: training decodes and re-encodes the full scale too, as "
        "released, instead of using the latents of the teacher",
    )
    shape: Literal["crop", "buckets"] = Field("crop", description="how images of other sizes are cut")
    caption_from_name: bool = Field(
        False, description="use the file name of an image without a caption as its caption"
    )

    @property
    def folder(self) -> Path:
        """The folder of the latents or images, that of the mini included."""
        return Path(mini.resolve(self.path, mini.DATA))

    @property
    def is_mini(self) -> bool:
        """Whether the data is the dataset of the mini."""
        return mini.is_named(self.path)


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerRecipe(Frozen):
    """AdamW for the student and the fake model."""

    lr: float = Field(4e-6, gt=0, description="learning rate of the student")
    fake_lr: float | None = Field(None, gt=0, description="learning rate of the fake model; null = lr")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="betas of AdamW")
    weight_decay: float = Field(0.01, ge=0, description="weight decay of AdamW")
    clip: float = Field(10.0, gt=0, description="maximum gradient norm")
    warmup: int = Field(0, ge=0, description="iterations of linear learning rate warm-up")


class TrainRecipe(Frozen):
    """Settings of the training loop."""

    iterations: int = Field(3000, ge=1, description="student updates")
    batch: int = Field(16, ge=1, description="samples per process and batch")
    accumulate: int = Field(1, ge=1, description="batches whose gradients are averaged before each update")
    # torch takes signed 64-bit seeds, and seed + 1 is used too.
    seed: int = Field(0, ge=0, lt=2**63 - 1, description="random seed of the run")
    precision: Literal["auto", "float32", "bf16"] = Field(
        "auto", description="bf16 = autocast; auto = bf16 on devices with native support"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations to save memory")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of the moving average of the student; null = none"
    )
    checkpoint_every: int = Field(100, ge=1, description="iterations between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints to keep")
    sample_every: int = Field(0, ge=0, description="iterations between sample grids; 0 = only at the end")
    sample_prompts: tuple[str, ...] = Field((), description="prompts of the sample grids")
    step_choice: Literal["round-robin", "sampled"] = Field(
        "round-robin", description="how the step of the schedule is chosen in each iteration"
    )


class Recipe(Frozen):
    """All settings of a run."""

    name: str = Field(description="name of the recipe, and default folder of its runs")
    about: str = Field("", description="one line about the recipe")
    model: ModelRecipe = ModelRecipe()
    teacher: TeacherRecipe = TeacherRecipe()
    schedule: ScheduleRecipe
    lora: LoraRecipe = LoraRecipe()
    loss: LossRecipe = LossRecipe()
    data: DataRecipe = DataRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    train: TrainRecipe = TrainRecipe()

    def to_yaml(self) -> str:
        """Return the recipe as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_mapping(cls, values: Any, *, origin: str = "recipe") -> Recipe:
        """Validate a nested mapping. RecipeError for invalid values and unknown keys; names the nearest known
        key.
        """
        if not isinstance(values, dict):
            raise RecipeError(f"{origin} must contain a mapping of recipe fields.")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise RecipeError(f"{origin}: " + "; ".join(_explain(e) for e in error.errors())) from None

    @classmethod
    def from_yaml(cls, path: Path) -> Recipe:
        """Read a YAML recipe file; RecipeError if it is invalid."""
        try:
            return cls.from_mapping(yaml.safe_load(read_utf8(path)), origin=str(path))
        except TextFileError as error:
            raise RecipeError(f"Cannot read the recipe file: {error}") from None
        except yaml.YAMLError as error:
            raise RecipeError(f"Cannot read the recipe file {path}: {error}") from None

    def override(self, assignments: str | Sequence[str] | Mapping[str, Any]) -> Recipe:
        """Apply dotted overrides: "train.iterations=200", several of them, or {"train.iterations": 200}.

        String keys take the text as typed, others parse numbers and YAML lists; the values of a mapping are
        used as given. The changed keys are appended to `about`, unless it is given too. Raises RecipeError.
        """
        found = dict[str, Any]()
        if isinstance(assignments, Mapping):
            found, assignments = dict(assignments), ()
        for assignment in texts(assignments):
            dotted, sign, text = assignment.partition("=")
            if not sign:
                raise RecipeError(
                    f"Override {assignment!r} must have the form key=value, as in train.iterations=200."
                )
            dotted = dotted.strip()
            try:
                found[dotted] = read_value(text, field_type(Recipe, dotted))
            except yaml.YAMLError as error:
                raise RecipeError(
                    f"Override {assignment!r} has an invalid value ({first_line(error)}); put quotes around "
                    "the whole of a list, as in 'lora.targets=[to_q, to_k]'."
                ) from None
        changed = self.with_values(found)
        return changed if "about" in found else changed.with_values({"about": about_of(self, changed, found)})

    def with_values(self, given: Mapping[str, Any]) -> Recipe:
        """Return a copy with fields replaced by dotted name; values are used as given, paths as text."""
        values = self.model_dump(mode="json")
        for dotted, value in given.items():
            if not isinstance(dotted, str):
                raise RecipeError(f"Recipe keys must be strings such as 'train.iterations'; got {dotted!r}.")
            _assign(values, dotted, fspath(value) if isinstance(value, PathLike) else value)
        return Recipe.from_mapping(values, origin="override" if given else "recipe")


def texts(assignments: Any) -> list[str]:
    """Return overrides as a list of strings; RecipeError for other types."""
    found = [assignments] if isinstance(assignments, str) or not isinstance(assignments, Iterable) else None
    found = list(assignments) if found is None else found
    if wrong := [text for text in found if not isinstance(text, str)]:
        raise RecipeError(
            "Overrides must be strings such as 'train.iterations=200', a list of them, or a mapping such as "
            f"{{'train.iterations': 200}}; got {wrong[0]!r}."
        )
    return found


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    place: Any = values
    for parent in parents:
        place = place.get(parent) if isinstance(place, dict) else None
    if not isinstance(place, dict) or last not in place:
        raise RecipeError(f"Unknown recipe key {dotted!r}; {nearest(dotted, field_names(Recipe))}")
    if isinstance(place[last], dict):  # also for a mapping, which would silently reset the keys it omits
        inside = ", ".join(f"{dotted}.{k}" for k in place[last])
        raise RecipeError(f"Recipe key {dotted!r} is a group of keys; set one of {inside}.")
    place[last] = value


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "recipe"
    if error["type"] == "extra_forbidden":
        return f"unknown key {where!r}; {nearest(where, field_names(Recipe))}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("value_error", "missing"):
        return f"{where}: {message}"
    if error["type"] == "tuple_type":
        message += "; put quotes around the whole list, as in 'lora.targets=[to_q, to_k]'"
    return f"{where} = {error['input']!r}: {message}"
