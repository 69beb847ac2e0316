"""The scheduler that plays step tables, beside the stock schedulers that the tables are compiled from."""

import copy
import json
import logging

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline
from helpers import assert_one_line_error

from ddpm_mlp_pipeline import (
    OnnxSampler,
    StepTable,
    compile_scheduler,
    export_bundle,
    load_checkpoint,
    pretrained,
)
from ddpm_mlp_pipeline.errors import ConfigurationError
from ddpm_mlp_pipeline.export.compile import make_scheduler
from ddpm_mlp_pipeline.table_scheduler import StepTableScheduler

STOCK = [("ddpm", 10, {}), ("ddim", 7, {}), ("dpmsolver_multistep", 6, {"algorithm_type": "sde-dpmsolver++"})]
STOCK += [("heun", 4, {}), ("euler_ancestral", 6, {})]


def of_tables(scheduler, *numbers):
    tables = [compile_scheduler(scheduler, number).to_dict() for number in numbers]
    return StepTableScheduler.from_config(scheduler.config, tables=tables)


def draw(pipeline, number=50, **options):
    return pipeline(number, torch.Generator().manual_seed(3), **options).points


@pytest.mark.parametrize(("name", "steps", "options"), STOCK)
def test_a_table_draws_what_its_stock_scheduler_draws(heart, name, steps, options):
    trained_with = heart.scheduler
    heart.scheduler = make_scheduler(name, trained_with, **options)
    expected = draw(heart, num_inference_steps=steps)
    table = compile_scheduler(heart.scheduler, steps)
    heart.scheduler = StepTableScheduler.from_config(trained_with.config, tables=[table.to_dict()])
    np.testing.assert_allclose(draw(heart), expected, atol=2e-5)


def test_known_values_are_filled_as_with_the_stock_scheduler(heart):
    heart.scheduler = DDIMScheduler.from_config(heart.scheduler.config)
    known = {"known": {"x": 0.5}, "resample": 2}
    expected = draw(heart, num_inference_steps=10, **known)
    heart.scheduler = of_tables(heart.scheduler, 10)
    actual = draw(heart, **known)
    np.testing.assert_allclose(actual, expected, atol=2e-5)
    np.testing.assert_allclose(actual[:, 0], 0.5, atol=1e-6)


def test_a_checkpoint_with_tables_loads_with_and_without_the_plugin_and_goes_back_to_stock(heart, tmp_path, caplog):
    trained_with = heart.scheduler
    heart.scheduler = of_tables(trained_with, 8, 4)
    expected = draw(heart), draw(heart, num_inference_steps=4)
    heart.save_pretrained(tmp_path / "fitted")
    index = json.loads((tmp_path / "fitted/model_index.json").read_text())
    assert index["scheduler"] == ["table_scheduler", "StepTableScheduler"]
    without = DiffusionPipeline.from_pretrained(tmp_path / "fitted", trust_remote_code=True)
    without.set_progress_bar_config(disable=True)
    assert type(without.scheduler) is not StepTableScheduler  # the code that the folder carries
    for loaded in (load_checkpoint(tmp_path / "fitted"), without):
        np.testing.assert_array_equal(draw(loaded), expected[0])
        np.testing.assert_array_equal(draw(loaded, num_inference_steps=4), expected[1])
        caplog.clear()
        logging.getLogger("diffusers").addHandler(caplog.handler)  # it doesn't propagate
        back = DDPMScheduler.from_config(loaded.scheduler.config)
        logging.getLogger("diffusers").removeHandler(caplog.handler)
        assert not caplog.records
        version = {"_diffusers_version": diffusers.__version__}  # of the one that wrote a configuration
        assert {**back.config, **version} == {**trained_with.config, **version}


def test_an_export_keeps_the_table_and_every_form_of_the_bundle_plays_it(heart, tmp_path):
    heart.scheduler = of_tables(heart.scheduler, 8, 4)
    heart.save_pretrained(tmp_path / "fitted")
    report = export_bundle(tmp_path / "fitted", tmp_path / "bundle", sampler="float32")
    assert max(difference[-1] for difference in report.parity.differences.values()) < 1e-4
    assert report.sampler_difference < 1e-4
    table = StepTable.load(tmp_path / "bundle/step_table.json")
    assert table.to_dict() == heart.scheduler.tables[8]
    export_bundle(tmp_path / "fitted", tmp_path / "four", num_inference_steps=4)
    assert len(OnnxSampler(tmp_path / "four")) == 4
    export_bundle(tmp_path / "fitted", tmp_path / "stock", "ddim", 10)
    assert OnnxSampler(tmp_path / "stock").scheduler == "DDIMScheduler"


def test_a_table_is_guided_as_its_calls_say(tmp_path):
    pipeline = load_checkpoint(pretrained("moons"))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    asked = {"class_labels": "upper"}
    guided = {"guidance_scale": 1.5, "guidance_interval": (900, 300)}
    expected, unguided = (
        draw(pipeline, num_inference_steps=8, **asked, **guided),
        draw(pipeline, num_inference_steps=8, **asked),
    )
    table = compile_scheduler(pipeline.scheduler, 8).guided(1.5, (900, 300))
    assert 0 < table.is_guided.sum() < 8
    pipeline.scheduler = StepTableScheduler.from_config(pipeline.scheduler.config, tables=[table.to_dict()])
    np.testing.assert_allclose(draw(pipeline, **asked), expected, atol=2e-5)
    np.testing.assert_allclose(draw(pipeline, **asked, guidance_scale=1.0), unguided, atol=2e-5)
    with pytest.raises(ValueError, match="guidance_interval needs a guidance_scale"):
        draw(pipeline, **asked, guidance_interval=(900, 300))

    pipeline.save_pretrained(tmp_path / "guided")
    report = export_bundle(tmp_path / "guided", tmp_path / "bundle", sampler="float32")
    assert max(difference[-1] for difference in report.parity.differences.values()) < 1e-4
    assert report.sampler_difference < 1e-4
    assert StepTable.load(tmp_path / "bundle/step_table.json").to_dict() == pipeline.scheduler.tables[8]


def test_a_number_of_calls_without_a_table_is_refused(heart, run_forked, tmp_path):
    heart.scheduler = of_tables(heart.scheduler, 8, 4)
    with pytest.raises(ValueError, match="there is no table of 5 calls, only of 4, 8"):
        draw(heart, num_inference_steps=5)
    with pytest.raises(ConfigurationError, match="no table of 5 calls, only of 4, 8"):
        compile_scheduler(heart.scheduler, 5)
    heart.save_pretrained(tmp_path / "fitted")
    argv = ("sample", tmp_path / "fitted", "--num_inference_steps", 5, "--output", tmp_path / "a.csv")
    assert_one_line_error(run_forked(*argv), "the checkpoint has no table of 5 calls, only of 4, 8")


def test_steps_beyond_the_last_are_refused(heart):
    scheduler = of_tables(heart.scheduler, 2)
    x = torch.zeros(1, 2)
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x).prev_sample
    with pytest.raises(ValueError, match="all steps of the table have been taken"):
        scheduler.step(x, 0, x)


def _wrong(change):
    def changed(table):
        table = copy.deepcopy(table)
        change(table)
        return table

    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_wrong(lambda table: table["steps"][0].update(log_variance=[0.0, 1.0])), "no learned variance"),
        (_wrong(lambda table: table["steps"][0].update(guidance_scale=float("inf"))), "finite numbers"),
        (_wrong(lambda table: table["steps"][1]["to_x_0"].__setitem__(0, float("nan"))), "finite numbers"),
        (_wrong(lambda table: table["steps"][0]["to_next"].append([1.0, 0.0, 0.0, 0.0])), "finite numbers"),
        (_wrong(lambda table: table["steps"].clear()), "step table"),
        (_wrong(lambda table: table.pop("clip_range")), "not a step table: KeyError"),
    ],
)
def test_a_wrong_table_is_refused(heart, change, message):
    table = compile_scheduler(heart.scheduler, 3).to_dict()
    with pytest.raises(ValueError, match=message):
        StepTableScheduler(tables=[change(table)])
    with pytest.raises(ValueError, match="at least one table"):
        StepTableScheduler()
