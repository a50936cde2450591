"""Roles on one frozen module: the teacher is the base itself, student and fake are LoRA adapters on it.

Guards against three silent errors (seen with torch 2.13 and peft 0.21). peft's adapter switch changes
requires_grad, so a role that is switched off before its backward pass loses its gradients. A checkpointed
block that is recomputed under another role gives wrong gradients. Parameters collected by requires_grad end
up in two optimizers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scalewise.method.cpu import role_linear

TEACHER = "teacher"


class Roles:
    """LoRA adapters by role name on a frozen module; `role()` selects the one that forward passes use."""

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        *,
        rank: int,
        targets: Sequence[str],
        alpha: float | None = None,
        seed: int = 0,
        fast: bool = False,
    ) -> None:
        """Add one adapter per name to a frozen `module` (A Gaussian, B zero: outputs are unchanged at first).

        With `fast`, plain linear layers get the LoRA layer of `scalewise.method.cpu` instead of peft's.
        ValueError if a name is that of the teacher, `module` is not frozen, or no module matches `targets`.
        """
        if TEACHER in names:
            raise ValueError(
                f"{TEACHER!r} is the frozen base and cannot be an adapter; use another name for the role."
            )
        self.module, self.names = module, tuple(names)
        base = (p for n, p in module.named_parameters() if ".lora_" not in n)
        if names and (module.training or any(p.requires_grad for p in base)):
            raise ValueError(
                "The base of the roles is trainable or in training mode; call requires_grad_(False) and "
                "eval() on it first, as loading does."
            )
        # Inside blocks only: a target such as FLUX's "proj_out" is also the name of the network's last layer.
        paths = [n for n, _ in module.named_modules() if any(n.endswith(f".{target}") for target in targets)]
        if names and not paths:
            raise ValueError(
                f"No module matches the LoRA targets {list(targets)}; give names of modules of this model."
            )
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha if alpha is not None else rank,
            target_modules=paths,
            init_lora_weights="gaussian",
            lora_dropout=0.0,
        )
        if fast:
            config._register_custom_module({nn.Linear: role_linear})  # type: ignore[dict-item]
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # peft warns about a second adapter on a module, which is intended here.
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            torch.manual_seed(seed)
            for name in self.names:
                inject_adapter_in_model(config, module, name)
        self.config = config
        self._layers = [(n, m) for n, m in module.named_modules() if isinstance(m, BaseTunerLayer)]
        self._parameters = {name: self._collect(name) for name in self.names}
        for _, layer in self._layers:
            layer.enable_adapters(False)  # also freezes adapters that the module had before
        for parameters in self._parameters.values():
            for parameter in parameters.values():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        self._now = TEACHER

    def _collect(self, name: str) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for path, layer in self._layers:
            for part in ("lora_A", "lora_B"):
                branch = getattr(layer, part)
                if name in branch:
                    found[f"{path}.{part}.weight"] = branch[name].weight
        return found

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Return the parameters of a role by name, such as "transformer_blocks.0.attn.to_q.lora_A.weight"."""
        if name not in self._parameters:
            raise ValueError(f"Unknown role {name!r}; trained roles are {list(self.names)}.")
        return self._parameters[name]

    @property
    def current(self) -> str:
        """The role that a forward pass would use now."""
        return self._now

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        """Activate a role within the context and restore the previous one afterwards. Re-entrant."""
        before = self._now
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, name: str) -> None:
        if name == self._now:
            return
        if name != TEACHER and name not in self.names:
            raise ValueError(f"Unknown role {name!r}; roles are {[TEACHER, *self.names]}.")
        # Not by peft's set_adapter: it changes requires_grad, so that a pending backward pass of another role
        # would lose its gradients, and takes 3 ms for the mini (one forward pass of one image takes 20).
        for _, layer in self._layers:
            layer._disable_adapters = name == TEACHER
            if name != TEACHER:
                layer._active_adapter = [name]
        self._now = name

    def checkpointing(
        self, context: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> Callable[..., Any]:
        """Return a gradient-checkpointing function that recomputes a block under the role of its forward
        pass, and within `context`.
        """

        def run(block: nn.Module, *inputs: Any) -> Any:
            name = self._now

            def under_role(*again: Any) -> Any:
                with self.role(name), context():
                    return block(*again)

            return checkpoint(under_role, *inputs, use_reentrant=False)

        return run

    def state(self, name: str) -> dict[str, Tensor]:
        """Return a copy of the weights of a role."""
        return {k: v.detach().clone() for k, v in self.parameters(name).items()}

    @torch.no_grad()
    def load(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Load the weights of a role; ValueError if names or shapes differ, and nothing is loaded."""
        own = self.parameters(name)
        missing, unexpected = own.keys() - tensors.keys(), tensors.keys() - own.keys()
        if missing or unexpected:
            example = sorted(missing or unexpected)[0]
            raise ValueError(
                f"The LoRA does not fit this model: {len(missing)} of {len(own)} weights are missing and "
                f"{len(unexpected)} are unexpected (for example {example}); "
                "it was trained on another base or with other targets."
            )
        for key, parameter in own.items():
            if parameter.shape != tensors[key].shape:
                axis = 0 if ".lora_A." in key else 1
                there, here = tensors[key].shape[axis], parameter.shape[axis]
                remedy = (
                    f"set lora.rank to {there} or" if there != here else "it was trained on another base;"
                )
                raise ValueError(
                    f"The LoRA does not fit: {key} is {list(tensors[key].shape)} in the file and "
                    f"{list(parameter.shape)} here; {remedy} use another file."
                )
        for key, parameter in own.items():  # after all checks, so that a rejected file changes nothing
            parameter.copy_(tensors[key])
