"""The only holder of weights: one frozen base, its roles, and the one question all others ask: x0."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from scalewise.method.adapter import Condition, ModelAdapter
from scalewise.method.features import tap
from scalewise.method.roles import TEACHER, Roles

Precision = Literal["auto", "float32", "bf16"]


def settle(precision: Precision, device: torch.device | str) -> Literal["float32", "bf16"]:
    """Turn "auto" into "bf16" where the device multiplies bfloat16 natively, else into "float32".

    Emulated bfloat16 is slower than float32: five times on a processor with AVX-512 alone.
    """
    if precision != "auto":
        return precision
    kind = torch.device(device).type
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if kind != "cpu":
        return "float32"
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else "float32"


class Backbone:
    """Answers "what is x0?" for teacher, student and fake model, which share the frozen base."""

    def __init__(
        self,
        model: ModelAdapter,
        roles: Sequence[str] = (),
        *,
        rank: int = 64,
        alpha: float | None = None,
        targets: Sequence[str] | None = None,
        precision: Precision = "float32",
        seed: int = 0,
    ) -> None:
        """Give the model one LoRA adapter per role; `precision` "bf16" runs every forward under autocast."""
        self.model = model
        self.precision = settle(precision, model.device)
        targets = model.lora_targets if targets is None else targets
        self.roles = Roles(model.denoiser, roles, rank=rank, alpha=alpha, targets=targets, seed=seed)

    @property
    def device(self) -> torch.device:
        """Where the denoiser runs."""
        return self.model.device

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """Parameters of a role, by name."""
        return self.roles.parameters(role)

    def enable_checkpointing(self) -> None:
        """Recompute blocks in the backward pass, each under the role of its forward."""
        self.model.enable_checkpointing(self.roles.checkpointing())

    @contextmanager
    def _under(self, role: str) -> Iterator[None]:
        bf16 = self.precision == "bf16"
        with self.roles.role(role), torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            yield

    def predict_x0(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        *,
        role: str = TEACHER,
        guidance: float | None = None,
        uncond: Condition | None = None,
    ) -> Tensor:
        """x0 [N, ...] in float32 from x_t at levels t [N]; guidance w = 1 means none: x0 = uncond + w (cond -
        uncond).

        With guidance, conditional and unconditional go through the model in one batch of 2 N; a model that
        takes guidance as an input needs one of N.
        """
        if guidance is not None and self.model.embedded_guidance is not None:
            cond, guidance = cond.with_guidance(guidance), None
        if guidance is None or guidance == 1.0:
            with self._under(role):
                prediction = self.model.predict(x_t, t, cond)
            return self.model.noise.x0(prediction, x_t, t)
        if uncond is None:
            raise ValueError(
                f"Guidance {guidance:g} needs the unconditional condition; give uncond or guidance 1."
            )
        count = len(x_t)
        both = Condition.cat([cond, uncond.expand(count) if len(uncond) == 1 else uncond])
        with self._under(role):
            prediction = self.model.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        told, untold = self.model.noise.x0(prediction, torch.cat([x_t, x_t]), torch.cat([t, t])).split(count)
        return untold + guidance * (told - untold)

    def features(self, x_t: Tensor, t: Tensor, cond: Condition, *, role: str, block: int) -> Tensor:
        """Image tokens [N, L, D] that block number `block` gives out; the blocks after it do not run."""
        with self._under(role), tap(self.model.block(block), self.model.image_tokens, stop=True) as found:
            self.model.predict(x_t, t, cond)
        return found.tokens

    def predict_x0_and_features(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, role: str, block: int
    ) -> tuple[Tensor, Tensor]:
        """x0 [N, ...] and the features [N, L, D] of a block, in one forward and without guidance."""
        with self._under(role), tap(self.model.block(block), self.model.image_tokens, stop=False) as found:
            prediction = self.model.predict(x_t, t, cond)
        return self.model.noise.x0(prediction, x_t, t), found.tokens
