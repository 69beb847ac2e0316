"""Parity of a bundle with its pipeline: rounding, however magnified, is told from errors."""

import sys
import textwrap

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpm_mlp_pipeline import DDPMMLPPipeline, MLPModel, StepTable, export_bundle, load_checkpoint, pretrained
from ddpm_mlp_pipeline.export.compile import make_scheduler
from ddpm_mlp_pipeline.export.parity import compare
from ddpm_mlp_pipeline.runtime.bundle import seal


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A stock pipeline whose random weights magnify rounding to 1e-4 in ten steps, and its bundle."""
    folder = tmp_path_factory.mktemp("untrained")
    torch.manual_seed(1)
    network = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder / "checkpoint")
    report = export_bundle(folder / "checkpoint", folder / "bundle", "ddim", 10).parity
    return folder, report


def compare_again(folder, change=lambda network: None):
    pipeline = load_checkpoint(folder / "checkpoint")
    pipeline.scheduler = make_scheduler("ddim", pipeline.scheduler)
    with torch.no_grad():
        change(pipeline.unet)
    return compare(pipeline, folder / "bundle", 10, 1e-4)


@pytest.mark.slow
def test_rounding_that_an_untrained_network_magnifies_is_no_reason_to_refuse(untrained):
    _, report = untrained
    assert report.ok
    assert report.single_steps.shape == (10,)
    assert report.single_steps.max() < 3e-6
    if max(difference[-1] for difference in report.differences.values()) > 1e-4:  # rounding differs between machines
        assert (
            str(report)
            .splitlines()[-1]
            .startswith(
                "more than the tolerance at the end: the network magnifies rounding: torch's own samples move by"
            )
        )


@pytest.mark.slow
@pytest.mark.parametrize("tensor", ["conv_out.bias", "down_blocks.0.resnets.0.conv1.weight"])
def test_other_weights_are_told_from_rounding(untrained, tensor):
    folder, _ = untrained
    report = compare_again(folder, lambda network: network.get_parameter(tensor).add_(1e-3))
    assert not report.ok
    assert (report.single_steps[:-1] > 1e-5).all()  # in every step but the last, which clips most values
    assert "more than the 1e-05 that rounding explains" in report.explanation


@pytest.mark.slow
@pytest.mark.parametrize("column", [0, 2])
def test_another_coefficient_is_told_from_rounding_and_its_step_named(untrained, column):
    folder, _ = untrained
    path = folder / "bundle" / "step_table.json"
    table = StepTable.load(path)
    table.to_next[6, 0, column] += 1e-3
    content = path.read_bytes()
    table.save(path)
    seal(folder / "bundle")
    try:
        report = compare_again(folder)
    finally:
        path.write_bytes(content)
        seal(folder / "bundle")
    assert not report.ok
    np.testing.assert_array_equal(np.flatnonzero(report.single_steps > 1e-5), [6])
    assert report.explanation.startswith("step 7 alone differs")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("deis", {"solver_order": 2, "timestep_spacing": "trailing"}),
        ("heun", {"timestep_spacing": "linspace"}),
    ],
)
def test_a_scheduler_that_loses_digits_is_exported_and_the_report_says_so(tmp_path, scheduler, options):
    """At σ = 20,000, torch's float32 steps are off by more than the tolerance, and its float64 steps are not."""
    report = export_bundle(pretrained("mnist"), tmp_path / "bundle", scheduler, 10, scheduler_options=options).parity
    assert max(difference[-1] for difference in report.differences.values()) > 1e-4
    assert report.in_float64.single_steps.max() < 3e-6 < 1e-5 < report.single_steps.max()
    assert "the pipeline's scheduler loses digits of float32" in str(report).splitlines()[-1]


def test_comparing_leaves_the_pipeline_as_it_was(heart, ddim_bundle):
    """This holds also if the scheduler's steps have options, and if the second comparison, in float64, fails."""
    heart.scheduler = make_scheduler("ddpm", heart.scheduler)
    assert not compare(heart, ddim_bundle, 20, 1e-4).ok
    assert "step" not in vars(heart.scheduler)
    assert not heart.unet._forward_hooks
    assert not heart.unet._forward_pre_hooks


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_steps(run, tmp_path):
    """75 steps of 8 and 16 images of 48 KiB are not kept in memory, where they would take 140 MiB."""
    DDPMMLPPipeline(MLPModel(3, 64, hidden_dim=8), DDPMScheduler()).save_pretrained(tmp_path / "checkpoint")
    code = """
        import resource, sys
        from ddpm_mlp_pipeline import export_bundle

        for steps in (5, 75):
            export_bundle(sys.argv[1], f"bundle-{steps}", "ddpm", steps)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024))
    """
    result = run(sys.executable, "-c", textwrap.dedent(code), tmp_path / "checkpoint")
    few, many = map(float, result.stdout.split())
    assert many - few < 50
