"""`OnnxSampler`: a seed gives the same samples however they are drawn, and bundles that don't fit are refused."""

import dataclasses
import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from diffusers import DDPMScheduler

from ddpm_mlp_pipeline import OnnxSampler
from ddpm_mlp_pipeline.errors import BundleError
from ddpm_mlp_pipeline.runtime.bundle import seal
from ddpm_mlp_pipeline.runtime.noise import normal
from ddpm_mlp_pipeline.runtime.pictures import image_grid


@pytest.fixture(params=["ddim", "ddpm"])
def sampler(request, ddim_bundle, ddpm_bundle):
    return OnnxSampler({"ddim": ddim_bundle, "ddpm": ddpm_bundle}[request.param])


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_a_seed_gives_the_same_samples_for_any_batch_size(sampler, batch_size):
    np.testing.assert_allclose(
        sampler.sample(30, seed=5, batch_size=batch_size), sampler.sample(30, seed=5, batch_size=30), atol=1e-5
    )


def test_a_sample_does_not_depend_on_how_many_are_asked_for(sampler):
    np.testing.assert_allclose(sampler.sample(3, seed=5), sampler.sample(100, seed=5)[:3], atol=1e-5)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_change_no_sample(ddpm_bundle, num_threads):
    expected = OnnxSampler(ddpm_bundle).sample(50, batch_size=10)
    samples = OnnxSampler(ddpm_bundle, num_threads).sample(50, batch_size=10)
    np.testing.assert_allclose(samples, expected, atol=1e-5)


def test_seeds_give_different_samples(sampler):
    assert np.abs(sampler.sample(10, seed=1) - sampler.sample(10, seed=2)).max() > 0.1


def test_the_steps_lead_to_the_samples(sampler):
    steps = list(sampler.steps(6, seed=4))
    assert [step.index for step in steps] == list(range(len(sampler.table)))
    np.testing.assert_array_equal([step.timestep for step in steps], sampler.table.timesteps)
    np.testing.assert_allclose(sampler.to_data_units(steps[-1].sample), sampler.sample(6, seed=4), atol=1e-5)
    assert not np.allclose(steps[0].sample, steps[-1].sample)  # each is a copy that the caller can keep


def test_a_sample_that_is_sent_replaces_the_steps_own(ddim_bundle):
    sampler = OnnxSampler(ddim_bundle)
    x = np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32)
    steps = sampler.steps(3)
    first = next(steps).sample
    assert np.abs(first - x).max() > 0.1
    second = steps.send(x)
    table = sampler.table
    rest = {name: getattr(table, name)[1:] for name in ("timesteps", "to_x_0", "to_next", "alphas_cumprod")}
    sampler.table = dataclasses.replace(table, **rest)
    np.testing.assert_allclose(second.sample, next(sampler.steps(3, latents=x)).sample, atol=1e-6)
    assert second.timestep == table.timesteps[1]


def test_it_is_the_stock_sampler_on_the_runtimes_noise(heart, ddpm_bundle):
    """Compare with ancestral sampling by the stock scheduler, with noise from the runtime's generator."""
    scheduler = DDPMScheduler.from_config(heart.scheduler.config)
    scheduler.set_timesteps(100)
    noise = torch.from_numpy(normal(9, range(4), 2, range(101)).copy())
    x = noise[0]
    with torch.no_grad():
        for k, t in enumerate(scheduler.timesteps):
            eps = heart.unet(x, t).sample
            # The scheduler would draw its own noise: take only its mean and variance.
            mean_and_noise = scheduler.step(eps, t, x, generator=torch.Generator().manual_seed(k)).prev_sample
            z = torch.randn(x.shape, generator=torch.Generator().manual_seed(k))
            sigma = scheduler._get_variance(t) ** 0.5 if t > 0 else 0
            x = mean_and_noise + sigma * (noise[k + 1] - z)
    np.testing.assert_allclose(OnnxSampler(ddpm_bundle).sample(4, seed=9), heart.to_data_units(x), atol=1e-4)


def test_batches_come_in_order_and_one_at_a_time(sampler):
    sampler.num_threads = 2
    batches = sampler.batches(100, batch_size=8)
    first = next(batches)
    assert first.shape == (8, 2)
    np.testing.assert_allclose(np.concatenate([first, *batches]), sampler.sample(100), atol=1e-5)


def test_closing_the_batches_stops_at_once(sampler):
    sampler.num_threads = 2
    moved = []
    batches = sampler.batches(5000, batch_size=10, on_step=moved.append)
    next(batches)
    batches.close()  # as if by Ctrl-C
    so_far = sum(moved)
    assert so_far <= 8 * 10 * len(sampler.table)
    assert sum(moved) == so_far


def test_samples_are_numbered(sampler):
    """Parts of a set, drawn apart and in other batches, are what one draw of all gives."""
    whole = sampler.sample(50, seed=3)
    parts = [sampler.sample(range(a, b), seed=3, batch_size=7) for a, b in [(0, 1), (1, 20), (20, 50)]]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-6)
    last = range(2**32 - 2, 2**32)
    np.testing.assert_allclose(sampler.sample(last)[1:], sampler.sample(last[1:]), atol=1e-6)
    assert not np.allclose(sampler.sample(last), whole[:2], atol=0.1)


def test_progress_counts_every_step_of_every_sample(sampler):
    moved = []
    sampler.sample(20, batch_size=6, on_step=moved.append)
    assert sum(moved) == 20 * len(sampler.table)


def test_the_network_alone(heart, sampler):
    x = np.random.default_rng(0).standard_normal((5, 2)).astype(np.float32)
    with torch.no_grad():
        expected = heart.unet(torch.from_numpy(x), 123).sample
    np.testing.assert_allclose(sampler.predict(x, 123), expected, atol=1e-5)


NO_SAMPLES = [0, -1, 2**32 + 1, range(3, 3), range(5, 2), range(-1, 2), range(0, 8, 2), range(2**32, 2**32 + 1)]
WRONG_NUMBERS = [{"batch_size": 0}, {"seed": -1}, {"seed": 2**63}, *({"samples": samples} for samples in NO_SAMPLES)]


@pytest.mark.parametrize("arguments", WRONG_NUMBERS)
def test_numbers_out_of_range_are_refused(sampler, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        sampler.sample(**arguments)


def edit_info(**changes):
    def edit(folder):
        info = json.loads((folder / "bundle.json").read_text())
        (folder / "bundle.json").write_text(json.dumps(info | changes))

    return edit


def rename_output(folder):
    model = onnx.load(folder / "unet.onnx")
    model.graph.output[0].name = model.graph.node[-1].output[0] = "noise"
    onnx.save(model, folder / "unet.onnx")
    seal(folder)


def cut(name):
    def edit(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:300])
        if name != "bundle.json":
            seal(folder)  # otherwise the checksum would fail first

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "unet.onnx").unlink(), r"lacks its network"),
        (lambda folder: (folder / "step_table.json").unlink(), r"lacks its step table"),
        (lambda folder: (folder / "bundle.json").unlink(), r"no bundle\.json"),
        (shutil.rmtree, r"there is no folder"),
        (cut("unet.onnx"), r"can't load .*unet\.onnx"),
        (cut("step_table.json"), r"is not a step table"),
        (cut("bundle.json"), r"does not describe a bundle"),
        (edit_info(version=99), r"version 2"),
        (
            edit_info(sample_shape=[3], data_mean=[0] * 3, data_std=[1] * 3, data_columns=[*"xyz"]),
            r"shape \(3,\), but the network",
        ),
        (edit_info(sample_shape=[]), r"bundle\.json: \[\] is not a shape of points or images"),
        (edit_info(data_mean=[1.0]), r"data_mean must hold 2 numbers"),
        (edit_info(data_columns=["x"]), r"data_columns must hold 2 names"),
        (
            edit_info(inputs=["sample", "timestep", "image"]),
            r"inputs .*'image'\], but this version knows only sample,",
        ),
        (edit_info(inputs=["sample", "timestep", "class_labels"]), r"does not describe a bundle: .*class_names"),
        *(
            (
                edit_info(
                    inputs=["sample", "timestep", "class_labels"],
                    **{"class_names": ["a", "b"], "null_label": 2, "class_shares": shares},
                ),
                r"class_shares must hold 2 numbers that sum to 1",
            )
            for shares in ([1], [1.5, -0.5], [0.5, 0.4], [0.5, float("nan")])
        ),
        (edit_info(data_std="wide"), r"does not describe a bundle"),
        (rename_output, r"must have the inputs sample and timestep and the output out_sample"),
    ],
)
def test_damaged_bundles_are_refused(ddim_bundle, tmp_path, damage, message):
    folder = shutil.copytree(ddim_bundle, tmp_path / "bundle")
    damage(folder)
    with pytest.raises(BundleError, match=message):
        OnnxSampler(folder)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_of_images_has_each_at_its_place(channels):
    images = np.random.default_rng(0).integers(1, 255, (7, 5, 6, channels), dtype=np.uint8)
    grid = np.asarray(image_grid([images[:4] / 255, images[4:] / 255], 7, gap=1, background="white"))
    assert grid.shape[:2] == (3 * 5 + 2, 3 * 6 + 2)
    for i, image in enumerate(images):
        row, column = divmod(i, 3)
        place = grid[6 * row : 6 * row + 5, 7 * column : 7 * column + 6]
        np.testing.assert_array_equal(place.reshape(image.shape), image)
    assert (grid == 255).sum() == grid.size - images.size  # all other pixels are background
