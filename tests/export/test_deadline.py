"""Nested tables, `num_calls` and `deadline_ms`."""

import itertools
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from helpers import random_weights

from ddpm_mlp_pipeline import DDPMMLPPipeline, MLPModel, OnnxSampler, export_bundle
from ddpm_mlp_pipeline.errors import BundleError, ConfigurationError
from ddpm_mlp_pipeline.export.compile import compile_scheduler, make_scheduler
from ddpm_mlp_pipeline.runtime.bundle import seal
from ddpm_mlp_pipeline.runtime.deadline import DrawTimes
from ddpm_mlp_pipeline.training.fitting import play

CALLS = (4, 8, 2, 1)  # the first is the default


@pytest.fixture(scope="module")
def tables():
    scheduler = DDPMScheduler(1000, clip_sample=True, clip_sample_range=3.0)
    return {calls: compile_scheduler(make_scheduler("ddpm", scheduler), calls) for calls in CALLS}


@pytest.fixture(scope="module")
def checkpoint(tables, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nested") / "checkpoint"
    torch.manual_seed(0)
    network = random_weights(MLPModel(3, hidden_dim=16, num_hidden_layers=2, embedding_dim=8, condition_dim=2))
    scheduler = DDPMScheduler(1000, clip_sample=True, clip_sample_range=3.0)
    pipeline = DDPMMLPPipeline(network, scheduler, condition_columns=["a", "b"])
    play(pipeline, list(tables.values()))
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint):
    folder = checkpoint.with_name("bundle")
    export_bundle(checkpoint, folder)
    return folder


def test_a_bundle_holds_all_tables_of_a_checkpoint(bundle, tables):
    sampler = OnnxSampler(bundle, num_threads=1)
    assert len(sampler) == 4
    assert set(sampler.tables) == {1, 2, 4, 8}
    for calls, table in sampler.tables.items():
        assert table.to_dict() == tables[calls].to_dict()
    info = json.loads((bundle / "bundle.json").read_text())
    assert info["nested_tables"] == [8, 2, 1]
    assert set(info["sha256"]) == {p.name for p in bundle.iterdir()} - {"bundle.json"}


def test_a_number_of_calls_draws_with_its_table(checkpoint, bundle, tmp_path):
    sampler = OnnxSampler(bundle)
    for calls in CALLS:
        export_bundle(checkpoint, tmp_path / "one", num_inference_steps=calls, overwrite=True)
        expected = OnnxSampler(tmp_path / "one").sample(5, seed=3, condition=[1.0, 2.0])
        np.testing.assert_array_equal(sampler.sample(5, seed=3, condition=[1.0, 2.0], num_calls=calls), expected)
        (*_, last) = sampler.steps(5, seed=3, condition=[1.0, 2.0], num_calls=calls)
        np.testing.assert_allclose(last.sample, expected, atol=1e-6)
    with pytest.raises(ConfigurationError, match="no table of 3 calls, only of 1, 2, 4, 8"):
        sampler.sample(num_calls=3)


def test_a_deadline_takes_the_largest_table_that_fits(bundle):
    """The clock goes on by a second each time that it is read, twice in the network's part of a draw."""
    sampler = OnnxSampler(bundle, num_threads=1, clock=itertools.count(0.0).__next__)
    # A call takes 1 s and the rest 2 s; the estimate adds a quarter.
    for seconds, calls in ((0.5, 1), (4.9, 1), (5.0, 2), (7.4, 2), (7.5, 4), (12.4, 4), (12.5, 8), (1e6, 8)):
        sampler._times[1] = DrawTimes()
        sampler._times[1].record(sampler.tables[1], 1.0, 2.0)
        drawn = sampler.sample(seed=5, condition=[0.0, 1.0], deadline_ms=1000 * seconds)
        np.testing.assert_array_equal(drawn, sampler.sample(seed=5, condition=[0.0, 1.0], num_calls=calls))


def test_a_few_interrupted_draws_do_not_change_the_estimate(tables):
    times = DrawTimes()
    assert times.estimate(tables[4]) is None
    assert times.choose(tables.values(), 1e9) is tables[1]
    for i in range(600):
        times.record(tables[2], 50.0 if i % 16 == 5 else 2.0, 50.0 if i % 16 == 6 else 0.5)
    assert times.estimate(tables[4]) == 1.25 * (4 * 1.0 + 0.5)
    assert times.choose(tables.values(), 5.7) is tables[4]
    for _ in range(20):  # now the machine has become slower
        times.record(tables[2], 4.0, 0.5)
    assert times.choose(tables.values(), 5.7) is tables[2]
    for _ in range(256):
        times.record(tables[1], 1.0, 0.5)
    assert times.choose(tables.values(), 5.7) is tables[4]


def test_a_guided_call_counts_twice(tables):
    times, guided = DrawTimes(), tables[2].guided(2.0)
    times.record(tables[2], 2.0, 0.0)
    assert times.estimate(guided) == 1.25 * 4.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"deadline_ms": 0}, "deadline_ms must be positive"),
        ({"deadline_ms": float("nan")}, "deadline_ms must be positive"),
        ({"deadline_ms": 1, "num_calls": 4}, "leave out num_calls"),
        ({"deadline_ms": 1, "samples": 9, "batch_size": 8}, "deadline_ms is for one batch"),
    ],
)
def test_wrong_deadlines_are_refused(bundle, arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        OnnxSampler(bundle).sample(**arguments)


def test_threads_do_not_share_a_workspace(bundle):
    """Draws of the same kind at the same time, each with its own condition, are those that one thread draws."""
    sampler = OnnxSampler(bundle, num_threads=1)
    conditions = np.random.default_rng(0).standard_normal((8, 2))
    expected = [[sampler.sample(seed=seed, condition=c) for seed in range(50)] for c in conditions]
    drawn = [[] for _ in conditions]

    def draw(i):
        drawn[i] += [sampler.sample(seed=seed, condition=conditions[i]) for seed in range(50)]

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(len(conditions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(drawn, expected)


def test_an_abandoned_draw_leaves_its_workspace_to_the_next(bundle):
    sampler = OnnxSampler(bundle, num_threads=1)
    expected = sampler.sample(seed=1)
    steps = sampler.steps(1, seed=2)
    next(steps)
    np.testing.assert_array_equal(sampler.sample(seed=1), expected)  # while the other draw goes on
    steps.close()
    np.testing.assert_array_equal(sampler.sample(seed=1), expected)


def test_draws_of_many_sizes_keep_few_workspaces(bundle):
    sampler = OnnxSampler(bundle, num_threads=1)
    for number in range(1, 60):
        sampler.sample(number)
    assert len(sampler._workspaces) <= 32


def listed(folder, calls):
    info = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps(info | {"nested_tables": calls}))


def changed(folder, **changes):
    path = folder / "step_table_2.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def learned(folder):
    steps = json.loads((folder / "step_table_2.json").read_text())["steps"]
    changed(folder, steps=[step | {"log_variance": [1.0, 0.0]} for step in steps])
    seal(folder)


def swapped(folder):
    shutil.copy(folder / "step_table_8.json", folder / "step_table_2.json")
    seal(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "step_table_2.json").unlink(), r"lacks its nested step table"),
        (lambda folder: changed(folder, initial_scale=2.0), r"step_table_2\.json is damaged or from another bundle"),
        (swapped, r"step_table_2\.json must have 2 steps, but has 8"),
        (learned, r"step_table_2\.json must have a log_variance if step_table\.json has one"),
        (lambda folder: listed(folder, ["../../secret"]), r"nested_tables must be a list of numbers"),
        (lambda folder: listed(folder, [True]), r"nested_tables must be a list of numbers"),
        (lambda folder: listed(folder, [-1]), r"nested_tables must be a list of numbers"),
        (lambda folder: listed(folder, {"2": 2}), r"nested_tables must be a list of numbers"),
        (lambda folder: listed(folder, [2, 2]), r"holds a number twice"),
    ],
)
def test_damaged_nested_tables_are_refused(bundle, tmp_path, damage, message):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    damage(folder)
    with pytest.raises(BundleError, match=message):
        OnnxSampler(folder)
