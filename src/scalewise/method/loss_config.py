"""Settings of the losses: the weight of each term, and the timesteps that it draws."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from scalewise.method.losses import Penalty
from scalewise.method.scales import shifted_sigmas


class Frozen(BaseModel):
    """Base class of all parts of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class Timesteps(Frozen):
    """Where a loss draws its timesteps t: uniformly from [low, high], or from a schedule within it."""

    draw: Literal["uniform", "schedule"] = Field("uniform", description="distribution of the timesteps")
    low: float = Field(0.0, ge=0, le=1000, description="lowest timestep")
    high: float = Field(1000.0, gt=0, le=1000, description="highest timestep")
    steps: int = Field(28, ge=1, description="steps of the schedule that `draw: schedule` draws from")
    shift: float = Field(3.0, gt=0, description="shift of that schedule")

    def entries(self) -> tuple[float, ...]:
        """Return the schedule's timesteps within [low, high]; empty with `draw: uniform`."""
        if self.draw == "uniform":
            return ()
        schedule = [1000 * sigma for sigma in shifted_sigmas(self.steps, self.shift)[:-1]]
        return tuple(t for t in schedule if self.low <= t <= self.high)

    @model_validator(mode="after")
    def _some_timestep(self) -> Timesteps:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if self.draw == "schedule" and not self.entries():
            raise ValueError(
                f"no timestep of the {self.steps}-step schedule lies in [{self.low:g}, {self.high:g}]"
            )
        return self


class Term(Frozen):
    """A part of the loss that draws timesteps."""

    @model_validator(mode="before")
    @classmethod
    def _earlier_name(cls, values: Any) -> Any:
        """Recipes written before version 0.2 call the timesteps `levels`."""
        if isinstance(values, dict) and "levels" in values and "timesteps" not in values:
            return {"timesteps" if key == "levels" else key: value for key, value in values.items()}
        return values


class MmdRecipe(Term):
    """Maximum mean discrepancy between features of a block (section 4.2)."""

    weight: float = Field(1.0, ge=0, description="weight of MMD; 0 = off")
    kernel: Literal["linear", "rbf"] = Field("linear", description="kernel; rbf = ablation A")
    penalty: Penalty = Field("squared", description="distance of the means with the linear kernel")
    c: float = Field(0.001, gt=0, description="c of the pseudo-Huber penalty")
    sigma: float | None = Field(
        100.0,
        gt=0,
        description="width of the RBF kernel, as released; null = median distance between real tokens",
    )
    features: Literal["teacher", "fake"] = Field("teacher", description="model that computes the features")
    timesteps: Timesteps = Timesteps(high=600)
    whole_batch: bool = Field(False, description="ablation B: average tokens over the batch")
    clean: bool = Field(False, description="ablation C: features of clean samples")


class DmdRecipe(Term):
    """Distribution matching by the difference of two scores, as in DMD2."""

    weight: float = Field(1.0, ge=0, description="weight of DMD; 0 = off")
    guidance: float = Field(4.5, ge=1, description="guidance scale of the teacher in DMD")
    timesteps: Timesteps = Timesteps(draw="schedule", high=790.5)


class GanRecipe(Frozen):
    """GAN with a discriminator head on the features of the fake model."""

    weight: float = Field(0.005, ge=0, description="weight of the GAN loss of the student; 0 = off")
    discriminator_weight: float = Field(0.01, ge=0, description="weight of the loss of the discriminator")


class FakeRecipe(Term):
    """Training of the fake model, which tracks the distribution of the student."""

    updates: int = Field(5, ge=1, description="fake-model updates before each student update")
    timesteps: Timesteps = Timesteps(draw="schedule")


class LossRecipe(Frozen):
    """loss = mmd + dmd + gan, each times its weight; without dmd and gan there is no fake model."""

    mmd: MmdRecipe = MmdRecipe()
    dmd: DmdRecipe = DmdRecipe()
    gan: GanRecipe = GanRecipe()
    fake: FakeRecipe = FakeRecipe()
    feature_block: int = Field(0, ge=0, description="block whose features MMD and GAN use")
    mmd_only: bool = Field(
        False, description="MMD alone on the features of the teacher; sets the weights of dmd and gan to 0"
    )

    @model_validator(mode="before")
    @classmethod
    def _alone(cls, values: Any) -> Any:
        """Switch off all other terms in the values, so that the stored recipe states what was trained."""
        if isinstance(values, dict) and values.get("mmd_only") is True:
            parts = {k: v for k in ("mmd", "dmd", "gan") if isinstance(v := values.get(k, {}), dict)}
            off: dict[str, dict[str, Any]] = {
                "mmd": {"features": "teacher"},
                "dmd": {"weight": 0.0},
                "gan": {"weight": 0.0},
            }
            return {**values, **{k: {**part, **off[k]} for k, part in parts.items()}}
        return values

    @property
    def needs_fake(self) -> bool:
        """Whether a fake model is trained."""
        return (
            self.dmd.weight > 0
            or self.gan.weight > 0
            or (self.mmd.weight > 0 and self.mmd.features == "fake")
        )

    @property
    def needs_head(self) -> bool:
        """Whether a discriminator head is trained."""
        return self.gan.weight > 0

    @model_validator(mode="after")
    def _something(self) -> LossRecipe:
        if not (self.mmd.weight or self.dmd.weight or self.gan.weight):
            raise ValueError("all loss weights are 0; set the weight of mmd, dmd or gan")
        if self.mmd.features == "fake" and not (self.dmd.weight or self.gan.weight):
            raise ValueError(
                "mmd.features=fake without dmd and gan would train a fake model for MMD alone; use teacher"
            )
        return self
