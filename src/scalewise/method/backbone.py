"""The model in all its roles: one frozen base with a LoRA adapter per role, which predicts x0."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from scalewise.method.adapter import Condition, ModelAdapter
from scalewise.method.cpu import BFloat16Linears, FastPaths, Float32AttentionBackward, choose_fast_paths
from scalewise.method.features import tap
from scalewise.method.roles import TEACHER, Roles

Precision = Literal["auto", "float32", "bf16"]


def choose_precision(precision: Precision, device: torch.device | str) -> Literal["float32", "bf16"]:
    """Resolve "auto" to "bf16" on devices with native bfloat16 matrix products, else to "float32".

    Emulated bfloat16 is slower than float32, for example by a factor of five on a CPU that only has AVX-512.
    """
    if precision != "auto":
        return precision
    kind = torch.device(device).type
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if kind != "cpu":
        return "float32"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return (
        "bf16" if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else "float32"
    )


class Backbone:
    """Predicts x0 as teacher, student or fake model, which share the frozen base."""

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
        fast: FastPaths | None = None,
    ) -> None:
        """Add one LoRA adapter per role; with `precision` "bf16" every forward pass runs under autocast.

        `fast`: faster paths with results equal up to rounding; None = those that help on the device.
        """
        self.model = model
        self.precision = choose_precision(precision, model.device)
        if fast is None:
            native = choose_precision("auto", model.device) == "bf16"
            fast = choose_fast_paths(model.device, self.precision, native=native)
        self.fast = fast
        targets = model.lora_targets if targets is None else targets
        self.roles = Roles(
            model.denoiser, roles, rank=rank, alpha=alpha, targets=targets, seed=seed, fast=fast.lora
        )
        self.linears = BFloat16Linears(model.denoiser, pack=not roles) if fast.weights else None

    @property
    def device(self) -> torch.device:
        """The device on which the denoiser runs."""
        return self.model.device

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """Return the parameters of a role by name."""
        return self.roles.parameters(role)

    def enable_checkpointing(self) -> None:
        """Enable gradient checkpointing; blocks are recomputed as in their forward pass."""
        self.model.enable_checkpointing(self.roles.checkpointing(self._fast_paths))

    @contextmanager
    def _fast_paths(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.linears is not None:
                stack.enter_context(self.linears.active())
            if self.fast.attention and torch.is_grad_enabled():
                stack.enter_context(Float32AttentionBackward())
            yield

    @contextmanager
    def _in_role(self, role: str) -> Iterator[None]:
        bf16 = self.precision == "bf16"
        with (
            self.roles.role(role),
            torch.autocast(self.device.type, torch.bfloat16, enabled=bf16),
            self._fast_paths(),
        ):
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
        """Predict x0 [N, C, H, W] in float32 from x_t [N, C, H, W] at timesteps t [N].

        Guidance w gives x0 = uncond + w (cond - uncond), computed in one batch of 2 N; w = 1 or None disables
        it. A model that takes guidance as an input needs a batch of N. Raises ValueError for guidance without
        `uncond`.
        """
        if guidance is not None and self.model.embedded_guidance is not None:
            cond, guidance = cond.with_guidance(guidance), None
        if guidance is None or guidance == 1.0:
            with self._in_role(role):
                prediction = self.model.predict(x_t, t, cond)
            return self.model.noise.x0(prediction, x_t, t)
        if uncond is None:
            raise ValueError(
                f"guidance={guidance:g} requires the unconditional condition; pass uncond or guidance=1."
            )
        count = len(x_t)
        both = Condition.cat([cond, uncond.expand(count) if len(uncond) == 1 else uncond])
        with self._in_role(role):
            prediction = self.model.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        x0 = self.model.noise.x0(prediction, torch.cat([x_t, x_t]), torch.cat([t, t]))
        x0_cond, x0_uncond = x0.split(count)
        return x0_uncond + guidance * (x0_cond - x0_uncond)

    def features(self, x_t: Tensor, t: Tensor, cond: Condition, *, role: str, block: int) -> Tensor:
        """Return the image tokens [N, L, D] of a block for x_t [N, C, H, W]; later blocks do not run."""
        with self._in_role(role), tap(self.model.block(block), self.model.image_tokens, stop=True) as found:
            self.model.predict(x_t, t, cond)
        return found.tokens

    def predict_x0_and_features(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, role: str, block: int
    ) -> tuple[Tensor, Tensor]:
        """Return x0 [N, C, H, W] and the features [N, L, D] of a block from one pass without guidance."""
        with self._in_role(role), tap(self.model.block(block), self.model.image_tokens, stop=False) as found:
            prediction = self.model.predict(x_t, t, cond)
        return self.model.noise.x0(prediction, x_t, t), found.tokens
