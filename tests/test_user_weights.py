"""Sampling leaves a pipeline's weights as they are: what is trained stays trainable, modes stay as set."""

from __future__ import annotations

import pytest
import torch

from scalewise import models
from scalewise.method.backbone import Backbone
from scalewise.method.scales import ScaleSchedule
from scalewise.models import PipelineAdapter
from scalewise.pipelines import PIPELINES


@pytest.mark.parametrize("name", models.FAMILIES)
def test_a_call_leaves_trainable_parameters_and_training_mode_as_they_are(name):
    family: type[PipelineAdapter] = models.FAMILIES[name]
    model = family.tiny()
    trained = Backbone(model, ["student"], rank=2)
    parameters = list(trained.parameters("student").values())
    for parameter in parameters:
        parameter.requires_grad_()
    model.denoiser.train()
    pipe = PIPELINES[family](**model.pipeline.components)
    pipe.set_progress_bar_config(disable=True)
    flags = [p.requires_grad for p in model.denoiser.parameters()]
    modes = [m.training for m in model.denoiser.modules()]
    text = "1000@2x4x4 600@3x8x8" if family.video else "1000@4x4 600@8x8"
    pipe(["a dog"], schedule=ScaleSchedule.parse(text), seed=0, output_type="latent")
    assert sum(flags) == len(parameters) > 0
    assert [p.requires_grad for p in model.denoiser.parameters()] == flags
    assert [m.training for m in model.denoiser.modules()] == modes and model.denoiser.training


@pytest.mark.parametrize("name", models.FAMILIES)
def test_a_loaded_model_is_frozen_and_not_in_training_mode(name, tmp_path):
    family: type[PipelineAdapter] = models.FAMILIES[name]
    family.tiny().save(tmp_path)
    for model in (family.tiny(), family.load(tmp_path)):
        modules = [c for c in model.pipeline.components.values() if isinstance(c, torch.nn.Module)]
        assert len(modules) >= 3
        assert not any(p.requires_grad for module in modules for p in module.parameters())
        assert not any(module.training for module in modules)
