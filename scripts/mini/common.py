"""Shared by the stages of the mini: folders, data, and a resumable training loop."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scalewise.method.backbone import choose_precision


def work_folder() -> Path:
    """Return the folder of intermediate files: $SCALEWISE_MINI_WORK, or ./mini-work."""
    return Path(os.environ.get("SCALEWISE_MINI_WORK", "mini-work"))


def half_is_fast() -> bool:
    """Return whether the processor supports bfloat16; emulation is five times slower than float32."""
    return choose_precision("auto", "cpu") == "bf16"


def to_float(pixels: np.ndarray | Tensor) -> Tensor:
    """Convert uint8 images [N, H, W, 3] to float [N, 3, H, W] in [-1, 1]."""
    return torch.as_tensor(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers; a tensor with two names is included once, under the first."""
    first = dict(module.named_parameters())
    return {**first, **{k: v for k, v in module.state_dict().items() if k in dict(module.named_buffers())}}


def load_own(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load the output of `own_tensors`; exits if names are missing or unexpected."""
    wrong = own_tensors(module).keys() ^ tensors.keys()
    if wrong:
        raise SystemExit(f"The saved state does not match the module: {sorted(wrong)[:3]}")
    module.load_state_dict(tensors, strict=False)


class Ema:
    """Exponential moving average of parameters, with the usual warm-up of the decay."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {k: v.detach().clone() for k, v in module.named_parameters()}
        self.steps = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        live = dict(module.named_parameters())
        torch._foreach_lerp_(list(self.shadow.values()), [live[k].detach() for k in self.shadow], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            parameter.copy_(self.shadow[name])


class Stage:
    """A training loop with a number of steps, regular checkpoints and automatic resuming.

    `loss(step)` returns the loss and a dict of values to log. Weights, averaged weights and optimizer state
    are saved as safetensors in `folder`; an interrupted stage resumes from the last save.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        *,
        lr: float,
        steps: int,
        warmup: int = 200,
        ema: float = 0.999,
        clip: float = 1.0,
        weight_decay: float = 0.01,
        decay_from: float = 0.7,
        save_seconds: float = 240.0,
    ) -> None:
        self.name, self.module, self.lr, self.steps, self.warmup, self.clip = (
            name,
            module,
            lr,
            steps,
            warmup,
            clip,
        )
        self.decay_from, self.save_seconds = decay_from, save_seconds
        self.folder = work_folder() / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ema = Ema(module, ema)
        self.names = [k for k, p in module.named_parameters() if p.requires_grad]
        parameters = dict(module.named_parameters())
        self.parameters = [parameters[k] for k in self.names]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True
        )
        self.step, self.seconds, self._stop = 0, 0.0, False
        self.warm_from = 0
        """Step at which the optimizer state is new: the learning rate warms up from there."""
        if (self.folder / "state.safetensors").exists():
            self._load()
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_stop", True))

    def rate(self) -> float:
        """Return the current learning rate: warm-up, constant, then linear decay."""
        warm = min(1.0, (self.step - self.warm_from + 1) / self.warmup)
        done = self.step / self.steps
        fall = 1.0 if done < self.decay_from else max(0.02, (1 - done) / (1 - self.decay_from))
        return self.lr * warm * fall

    def run(self, loss: Callable[[int], tuple[Tensor, dict[str, float]]], *, log_every: int = 50) -> None:
        """Train to `steps`, logging to log.jsonl in the stage's folder."""
        saved = started = time.time()
        since, seen, totals = time.time(), 0, {}
        while self.step < self.steps and not self._stop:
            torch.manual_seed(self.step * 7919 + 17)
            value, numbers = loss(self.step)
            value.backward()
            norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
            if not math.isfinite(float(norm)):
                self.optimizer.zero_grad(set_to_none=True)
                raise SystemExit(f"{self.name}: gradient is {float(norm)} at step {self.step}; lower the lr")
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.ema.update(self.module)
            self.step += 1
            seen += 1
            for key, number in {"loss": float(value.detach()), **numbers}.items():
                totals.setdefault(key, []).append(number)
            if self.step % log_every == 0:
                row = {
                    "step": self.step,
                    **{k: round(float(np.mean(v)), 5) for k, v in totals.items()},
                    "norm": round(float(norm), 3),
                    "lr": self.rate(),
                    "seconds": round(self.seconds + time.time() - started, 1),
                    "steps_per_second": round(seen / (time.time() - since), 3),
                }
                with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)
                since, seen, totals = time.time(), 0, {}
            if time.time() - saved > self.save_seconds:
                self._save(self.seconds + time.time() - started)
                saved = time.time()
        self.seconds += time.time() - started
        self._save(self.seconds)

    def _save(self, seconds: float) -> None:
        tensors = {f"module/{k}": v.detach().contiguous() for k, v in own_tensors(self.module).items()}
        tensors |= {f"ema/{k}": v.contiguous() for k, v in self.ema.shadow.items()}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer/{name}/{key}"] = value.contiguous()
        head = {"step": str(self.step), "ema_steps": str(self.ema.steps), "seconds": str(seconds)}
        save_file(tensors, self.folder / "state.tmp", metadata=head)
        os.replace(self.folder / "state.tmp", self.folder / "state.safetensors")

    def _load(self) -> None:
        from safetensors import safe_open

        path = self.folder / "state.safetensors"
        with safe_open(path, "pt") as file:
            head = file.metadata()
        tensors = load_file(path)
        load_own(self.module, {k[7:]: v for k, v in tensors.items() if k.startswith("module/")})
        self.ema.shadow = {k[4:]: v for k, v in tensors.items() if k.startswith("ema/")}
        self.ema.steps, self.step, self.seconds = (
            int(head["ema_steps"]),
            int(head["step"]),
            float(head["seconds"]),
        )
        for name, parameter in zip(self.names, self.parameters, strict=True):
            prefix = f"optimizer/{name}/"
            state = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            if state:
                self.optimizer.state[parameter] = state
            else:
                self.warm_from = self.step
        print(f"{self.name}: resumed from step {self.step}", flush=True)


def load_averaged(name: str, module: nn.Module) -> nn.Module:
    """Load a stage's averaged weights (buffers from the live module) into `module`, in eval mode."""
    tensors = load_file(work_folder() / name / "state.safetensors")
    state = {k[7:]: v for k, v in tensors.items() if k.startswith("module/")}
    state |= {k[4:]: v for k, v in tensors.items() if k.startswith("ema/")}
    load_own(module, state)
    return module.eval().requires_grad_(False)


def euler(
    velocity: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor, *, steps: int, guidance: float,
    shift: float,
) -> Tensor:  # fmt: skip
    """Sample from noise x [N, ...] by Euler steps on the shifted schedule, with classifier-free guidance.

    `velocity(both, t)` gets x twice [2 N, ...] and t [2 N] in [0, 1000]; it returns the velocities with and
    without the caption, each [N, ...].
    """
    linear = torch.linspace(1, 1 / 1000, steps)
    sigmas = torch.cat([shift * linear / (1 + (shift - 1) * linear), torch.zeros(1)])
    for now, then in pairwise(sigmas):
        conditional, unconditional = velocity(torch.cat([x, x]), (1000 * now).expand(2 * len(x)))
        x = x + (then - now) * (unconditional + guidance * (conditional - unconditional))
    return x


def batches(count: int, size: int, step: int, *, seed: int = 0) -> Tensor:
    """Return the indices [size] of batch `step` in shuffled passes over range(count)."""
    start = step * size
    out = []
    while len(out) < size:
        epoch, offset = divmod(start + len(out), count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        out.extend(order[offset : offset + size - len(out)].tolist())
    return torch.tensor(out)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Compute the PSNR [N] in dB of images [N, 3, H, W] in [-1, 1]."""
    error = ((a.clamp(-1, 1) - b.clamp(-1, 1)) / 2).square().mean(dim=(1, 2, 3))
    return -10 * error.clamp_min(1e-10).log10()


def chunks(count: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` that cover range(count)."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
