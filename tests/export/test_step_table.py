"""The step table's file format, and the files that it refuses."""

import json

import numpy as np
import pytest
from diffusers import DDPMScheduler, UniPCMultistepScheduler

from ddpm_mlp_pipeline import StepTable, compile_scheduler
from ddpm_mlp_pipeline.errors import BundleError


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "step_table.json"
    compile_scheduler(DDPMScheduler(), 30).save(path)
    return path


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), UniPCMultistepScheduler()])
def test_a_saved_table_is_the_same_bit_for_bit(scheduler, tmp_path):
    path = tmp_path / "step_table.json"
    table = compile_scheduler(scheduler, 30)
    table.save(path)
    again = StepTable.load(path)
    for name in ("timesteps", "to_x_0", "to_next"):
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))
    for name in ("scheduler", "initial_scale", "clip_range"):
        assert getattr(again, name) == getattr(table, name)


def test_a_table_prints_its_steps(path):
    text = repr(StepTable.load(path))
    assert text.startswith("DDPMScheduler, 30 network calls, x̂_0 clipped to ±1")
    assert "957" in text  # the first timestep, (30 − 1) · 33


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("steps"),
        lambda content: content.update(steps=[]),
        lambda content: content.update(steps="many"),
        lambda content: content.update(version=99),
        lambda content: content.update(clip_range=-1),
        lambda content: content.update(initial_scale=0),
        lambda content: content.pop("initial_scale"),
        lambda content: content["steps"][3].pop("to_next"),
        lambda content: content["steps"][3].update(to_next=[1, 2]),
        lambda content: content["steps"][3].update(to_next=[[1, 2, 3, float("nan")]]),
        lambda content: content["steps"][0].update(to_next=[[1, 2, 3, 4], [1, 2, 3, 4]]),
        lambda content: content["steps"][3].update(timestep="soon"),
    ],
)
def test_an_edited_table_is_refused(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"step_table\.json"):
        StepTable.load(path)
