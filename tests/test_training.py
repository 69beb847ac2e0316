"""The training loop, against a closed form, and as users launch it."""

import contextlib
import itertools
import re
import shutil
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput
from helpers import LAUNCH, ROOT, assert_one_line_error
from PIL import Image
from small_training import small_pipeline, train_small, training_options

from ddpm_mlp_pipeline import DDPMMLPPipeline, MLPModel, TrainingArguments, train
from ddpm_mlp_pipeline.commands import bound, doctor, evaluate, plot
from ddpm_mlp_pipeline.data.batches import TensorBatches
from ddpm_mlp_pipeline.errors import ConfigurationError, DivergenceError
from ddpm_mlp_pipeline.figures import plot_losses
from ddpm_mlp_pipeline.training.losses import min_snr_weights, training_target
from ddpm_mlp_pipeline.training.options import PREDICTION_TYPES
from ddpm_mlp_pipeline.training.run import _will_be_skipped

SHORT = ("--max_train_steps", 40, "--lr_warmup_steps", 5, "--dataset_size", 3000, "--train_batch_size", 256)


@pytest.fixture
def launch(run):
    def launch(*argv):
        return run(*LAUNCH, ROOT / "train_scripts" / "train_points.py", *argv)

    return launch


def test_the_loss_reaches_its_closed_form(tmp_path):
    """For standard normal data the best ε is √(1 − ᾱ_t) x_t, and its loss at t is ᾱ_t."""
    torch.manual_seed(0)
    pipeline = DDPMMLPPipeline(MLPModel(1, hidden_dim=32, num_hidden_layers=2), DDPMScheduler(clip_sample=False))
    args = TrainingArguments(
        output_dir=str(tmp_path),
        train_batch_size=2048,
        max_train_steps=1000,
        learning_rate=3e-3,
        lr_warmup_steps=50,
        ema_max_decay=0.99,
        report_to="none",
    )
    losses = train(pipeline, TensorBatches(torch.randn(200_000, 1)), args)
    assert len(losses) == 1000
    alphas_cumprod = pipeline.scheduler.alphas_cumprod
    assert np.mean(losses[-300:]) == pytest.approx(alphas_cumprod.mean().item(), rel=0.03)

    x_t = torch.linspace(-2, 2, 9)[:, None]
    with torch.no_grad():
        for t in (50, 300, 700):
            best = (1 - alphas_cumprod[t]).sqrt() * x_t
            torch.testing.assert_close(pipeline.unet(x_t, t).sample, best, atol=0.06, rtol=0)
    points = DDPMMLPPipeline.from_pretrained(tmp_path)(5000, torch.Generator().manual_seed(0), 100).points
    assert points.mean() == pytest.approx(0, abs=0.1)
    assert points.std() == pytest.approx(1, abs=0.1)


def test_the_checkpoint_holds_the_averaged_weights(tmp_path):
    averaged, losses = train_small(tmp_path / "ema")
    raw, same_losses = train_small(tmp_path / "raw", use_ema=False)
    assert losses == same_losses
    assert averaged != raw


def test_epochs_are_passes_over_the_data(tmp_path):
    _, losses = train_small(tmp_path, num_epochs=3, max_train_steps=None)
    assert len(losses) == 3 * (150 // 32)


class Recorded(TensorBatches):
    """Record the samples of each batch."""

    def __init__(self, number):
        super().__init__(torch.randn(number, 2))
        self.batches = []

    def __getitems__(self, indices):
        self.batches.append(indices)
        return super().__getitems__(indices)


def test_every_epoch_has_its_own_order_and_no_sample_is_left_out_for_good(tmp_path):
    def batches(folder, **changes):
        dataset = Recorded(150)  # an epoch has four batches of 32, and leaves out 22 samples
        train(small_pipeline(), dataset, training_options(folder, max_train_steps=40, **changes))
        return dataset.batches

    found = batches(tmp_path, checkpointing_steps=6)
    epochs = {tuple(np.concatenate(found[i : i + 4]).tolist()) for i in range(0, 40, 4)}
    assert len(epochs) == 10
    assert [len(set(epoch)) for epoch in epochs] == [128] * 10
    assert set().union(*epochs) == set(range(150))

    for state in ("checkpoint-36", "checkpoint-30", "checkpoint-6"):  # at the end and in the middle of an epoch
        shutil.copytree(tmp_path / state, tmp_path / f"from-{state}" / state)
        resumed = batches(tmp_path / f"from-{state}", resume_from_checkpoint=state)
        assert resumed == found[int(state.partition("-")[2]) :]


def test_the_seed_decides(tmp_path):
    weights, _ = train_small(tmp_path / "a", seed=1)
    assert train_small(tmp_path / "b", seed=1)[0] == weights
    assert train_small(tmp_path / "c", seed=2)[0] != weights


@pytest.mark.parametrize(
    "changes",
    [
        {"train_batch_size": 0},
        {"max_train_steps": -1},
        {"num_epochs": 0},
        {"max_train_steps": None},
        {"gradient_accumulation_steps": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"lr_warmup_steps": -1},
        {"ema_max_decay": 1.0},
        {"seed": -1},
        {"checkpointing_steps": 0},
        {"snr_gamma": 5.0, "loss_type": "bound"},
        {"variance_type": "learned_range"},
    ],
)
def test_impossible_options_are_refused(tmp_path, changes):
    with pytest.raises(ConfigurationError, match=next(iter(changes))):
        training_options(tmp_path, **changes)


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="larger than the data set, which holds 150"):
        train_small(tmp_path, train_batch_size=151)


def test_a_loss_that_is_no_number_stops_the_training_before_its_step(tmp_path):
    batches = iter(range(11))

    def spoil(batch, draw):
        return batch._replace(x_0=batch.x_0 * float("nan")) if next(batches) == 7 else batch

    message = r"loss is nan at step 8, with a learning rate of .*: a lower --learning_rate .* is .*checkpoint-6$"
    with pytest.raises(DivergenceError, match=message):
        train_small(tmp_path, augment=spoil, checkpointing_steps=3)
    assert not (tmp_path / "model_index.json").exists()
    with pytest.raises(DivergenceError, match="there is no checkpoint to go back to"):
        train_small(tmp_path / "none", augment=lambda batch, draw: batch._replace(x_0=batch.x_0 * float("nan")))


def test_a_gradient_that_is_no_number_stops_the_training_before_its_step(tmp_path):
    """Its loss is finite, and the state would be saved before the next loss."""
    pipeline = small_pipeline()
    gradients = iter(range(11))
    parameter = next(pipeline.unet.parameters())
    parameter.register_hook(lambda gradient: gradient / (0 if next(gradients) == 5 else 1))
    with pytest.raises(DivergenceError, match=r"norm is (inf|nan) and the loss is \d\.\d+ at step 6.*checkpoint-5$"):
        train(pipeline, TensorBatches(torch.randn(150, 2)), training_options(tmp_path, checkpointing_steps=1))
    assert all(parameter.isfinite().all() for parameter in pipeline.unet.parameters())


class Overflowing(MLPModel):
    """3.4e38 is finite in float32, and overflows in bfloat16."""

    def forward(self, sample, timestep, return_dict=True):
        large = F.linear(torch.ones(1, 1), torch.full((1, 1), 3.4e38)).float()
        return UNet2DOutput(super().forward(sample, timestep).sample + 0 * large)


@pytest.fixture
def other_precision():
    """Reset Accelerate, which allows one precision per process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("other_precision")
def test_an_overflow_of_16_bits_is_told_from_a_divergence(tmp_path):
    data = TensorBatches(torch.randn(150, 2))
    args = training_options(tmp_path / "bf16", mixed_precision="bf16")
    with pytest.raises(DivergenceError, match=r"nan at step 1.*: bf16 overflows where float32 does not"):
        train(small_pipeline(Overflowing), data, args)
    args = training_options(tmp_path / "nan", mixed_precision="bf16")
    with pytest.raises(DivergenceError, match=r"nan at step 1.*: a lower --learning_rate"):
        train(small_pipeline(), TensorBatches(torch.full((150, 2), float("nan"))), args)


def test_the_steps_that_fp16_skips_are_no_divergence_until_its_scale_is_used_up():
    """torch's initial scale, 2^16, can be halved sixteen times before it is below 1."""
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer, scaler = torch.optim.SGD([weight]), torch.amp.GradScaler("cpu")
    skipped = 0
    while True:
        scaler.scale(weight * float("inf")).backward()
        if not _will_be_skipped(SimpleNamespace(scaler=scaler)):
            break
        skipped += 1
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert skipped == 17
    assert weight == 1


@pytest.mark.parametrize("snr_gamma", [1.0, 5.0])
def test_min_snr_weighting_leaves_the_reported_loss_as_it_is(tmp_path, snr_gamma):
    _, plain = train_small(tmp_path / "plain")
    _, weighted = train_small(tmp_path / "weighted", snr_gamma=snr_gamma)
    assert weighted[0] == plain[0]
    assert weighted[-1] != plain[-1]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_targets_and_their_weights_agree_with_the_stock_scheduler(prediction_type):
    """The scheduler turns each target into x_0. A wrong prediction costs min(SNR, γ) times the squared error of the
    x_0 that follows from it."""
    args = TrainingArguments(output_dir="", num_epochs=1, prediction_type=prediction_type)
    scheduler = DDPMScheduler.from_config(args.make_scheduler(1.0).config, clip_sample=False)
    torch.manual_seed(0)
    x_0, eps, error = torch.randn(3, 200, 5, dtype=torch.float64)
    t = torch.randint(900, (200,))
    x_t, target = scheduler.add_noise(x_0, eps, t), training_target(scheduler, x_0, eps, t)

    def implied_x_0(prediction):
        rows = zip(prediction[:, None], t, x_t[:, None], strict=True)
        return torch.cat([scheduler.step(*row).pred_original_sample for row in rows])

    torch.testing.assert_close(implied_x_0(target), x_0, rtol=1e-4, atol=1e-4)
    squared_error = (implied_x_0(target + error) - x_0).square().sum(dim=1)
    alphas_cumprod = scheduler.alphas_cumprod[t]
    expected = (alphas_cumprod / (1 - alphas_cumprod)).clamp(max=5) * squared_error
    weighted = min_snr_weights(scheduler, t, 5) * error.square().sum(dim=1)
    torch.testing.assert_close(weighted, expected, rtol=1e-3, atol=1e-6)


def test_launched_it_leaves_checkpoint_figures_and_logs(launch, tmp_path):
    result = launch("--dataset", "two_moons", "--output_dir", tmp_path / "run", *SHORT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{tmp_path / 'run'}: the checkpoint")
    assert "loss=" in result.stderr
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        *("model_index.json", "pipeline.py", "unet", "scheduler", "logs"),
        *("loss.png", "forward_process.png", "samples.png", "process.gif", "README.md"),
    }
    assert list((tmp_path / "run" / "logs").rglob("events.out.tfevents.*"))
    with Image.open(tmp_path / "run" / "process.gif") as animation:
        assert animation.n_frames > 50
    modes = {path.stat().st_mode for path in (tmp_path / "run").rglob("*.*") if path.is_file()}
    assert len(modes) == 1  # the weights have the permissions of the other files
    pipeline = DDPMMLPPipeline.from_pretrained(tmp_path / "run")
    assert pipeline(10, num_inference_steps=5).points.shape == (10, 2)


def test_a_log_gets_few_lines_and_figures_can_be_left_out(run, tmp_path):
    start = time.monotonic()
    argv = ("--output_dir", tmp_path / "run", "--no-figures", *SHORT, "--max_train_steps", 500, "--report_to", "none")
    result = run(sys.executable, ROOT / "train_scripts" / "train_points.py", *argv, text=False)
    assert result.returncode == 0, result.stderr
    assert b"\r" not in result.stderr
    lines = [line for line in result.stderr.decode().splitlines() if line.startswith("training:")]
    assert 2 <= len(lines) <= 2 + (time.monotonic() - start) / 10
    assert "500/500" in lines[-1]
    assert result.stdout.decode() == f"{tmp_path / 'run'}: the checkpoint, README.md\n"
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"model_index.json", "pipeline.py", "unet", "scheduler", "README.md"}


@pytest.mark.parametrize(
    "losses", [[5000.0, 900.0, *[3.0, -2.0, 4.0] * 200], [5000.0], [1.2, 1.1, *[0.4, 0.35] * 200], [-3.0, -2.0]]
)
def test_the_losses_figure_shows_the_first_steps_and_the_last(losses):
    axes = plot_losses(losses).axes[0]
    height = axes.transAxes.inverted().transform(axes.transData.transform([(1, loss) for loss in losses]))[:, 1]
    assert height.min() >= 0
    assert height.max() <= 1
    if len(losses) > 100:
        assert height[-100:].max() - height[-100:].min() > 0.03


def test_a_preset_sets_options_and_the_command_line_wins(run_forked, tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("dataset: circles\nhidden_dim: 24\nnum_hidden_layers: 1\nreport_to: none\nuse_ema: false\n")
    options = ("--num_hidden_layers", 2, "--no-figures")
    result = run_forked("train_points", "--config", preset, "--output_dir", tmp_path / "run", *SHORT, *options)
    assert result.returncode == 0, result.stderr
    config = DDPMMLPPipeline.from_pretrained(tmp_path / "run").unet.config
    assert (config.hidden_dim, config.num_hidden_layers) == (24, 2)
    assert not (tmp_path / "run" / "logs").exists()


def test_after_some_steps_the_time_that_remains_is_told(tmp_path, capsys):
    batches = itertools.count()

    def stop_after_26(x_0, u):
        if next(batches) == 26:
            raise InterruptedError
        return x_0

    with pytest.raises(InterruptedError):
        train_small(tmp_path, stop_after_26, max_train_steps=10**6)
    assert re.search(r"999975 more steps take about [0-9.]+ (minutes|hours); Ctrl-C saves", capsys.readouterr().out)


def test_a_users_table_of_three_columns(run, run_forked, tmp_path, capsys):
    rng = np.random.default_rng(0)
    table = rng.standard_normal((600, 3)) * [10, 0.1, 1] + [170, 2, 0]
    rows = ['name,"height, cm",weight,eyes,age', *("A,{},{},,{}".format(*row) for row in table)]
    (tmp_path / "people.csv").write_text("\n".join(rows))
    argv = ("--dataset", tmp_path / "people.csv", "--output_dir", tmp_path / "run", *SHORT[:4], "--ddpm_num_steps", 50)
    result = run_forked("train_points", *argv)
    assert_one_line_error(result, "'A' in row 1, column 'name'", "row 1, column 'eyes'", "--exclude name eyes")
    result = run_forked("train_points", *argv, "--exclude", "name", "eyes", "--no-figures")
    assert result.returncode == 0, result.stderr
    # Evaluation uses the columns that the checkpoint names.
    data = ("--dataset", tmp_path / "people.csv")
    for main, *argv in [
        (bound.main, tmp_path / "run", *data, "--num_samples", 10),
        (plot.main, "forward", tmp_path / "run", *data, "--output", tmp_path / "forward.png"),
        (evaluate.main, tmp_path / "run", *data, "--num_samples", 50, "--repeats", 1),
    ]:
        main([str(word) for word in argv])
    with contextlib.suppress(SystemExit):
        doctor.main([str(tmp_path / "run"), *map(str, data)])
    assert "data: " in capsys.readouterr().out
    assert run_forked("export", tmp_path / "run", tmp_path / "bundle").returncode == 0
    assert (
        run("ddpm-sample", tmp_path / "bundle", "--num_samples", 300, "--output", tmp_path / "new.csv").returncode == 0
    )
    assert (tmp_path / "new.csv").read_text().startswith('"height, cm",weight,age\n')
    argv = (tmp_path / "new.csv", *data, "--num_samples", 300, "--repeats", 1)
    evaluate.main([str(word) for word in argv])  # by the names in the samples' file
    (tmp_path / "lacking.csv").write_text("height,weight,age\n" + "1,2,3\n" * 20)
    with pytest.raises(SystemExit):
        bound.main([str(tmp_path / "run"), "--dataset", str(tmp_path / "lacking.csv")])
    assert "no column 'height, cm', only 'height', 'weight', 'age'" in capsys.readouterr().err


def test_wrong_trainings_end_in_one_line(run, run_forked, tmp_path):
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n3,four\n")
    (tmp_path / "flat.csv").write_text("a,b\n1,2\n3,2\n")
    (tmp_path / "unknown.yaml").write_text("dataset: heart\nlearning_rat: 1\n")
    (tmp_path / "list.yaml").write_text("- heart\n")
    (tmp_path / "type.yaml").write_text("hidden_dim: wide\n")
    output = ("--output_dir", tmp_path / "run")
    cases = [
        (("--dataset", "hart"), ["unknown data set 'hart'", "heart, swiss_roll, two_moons"]),
        (("--dataset", tmp_path / "bad.csv"), ["row 2", "'b'", "'four'"]),
        (("--dataset", tmp_path / "flat.csv"), ["'b'", "constant"]),
        (("--dataset", tmp_path / "none.csv"), ["no file"]),
        (("--dataset_size", 0), ["at least 1"]),
        (("--dataset_size", 100, "--train_batch_size", 101), ["larger than the data set, which holds 100"]),
        (("--max_train_steps", 0), ["max_train_steps"]),
        (("--train_batch_size", -1), ["train_batch_size"]),
        (("--embedding_dim", 7), ["embedding_dim"]),
        (("--ddpm_num_steps", 1), ["ddpm_num_steps"]),
        (("--seed", 2**32), ["seed"]),
        (("--report_to", "nobody"), ["report_to", "'nobody'"]),
        (("--mixed_precision", "bf16"), ["--mixed_precision no"]),
        (("--conf", "heart"), ["--conf"]),
        (("--config",), ["--config"]),
        (("--hidden_dim", "wide"), ["hidden_dim", "'wide'"]),
        (("--config", "harts"), ["no preset 'harts'", "heart, ", "swiss_roll"]),
        (("--config", tmp_path / "unknown.yaml"), ["learning_rat", "which this command does not have"]),
        (("--config", tmp_path / "list.yaml"), ["option: value"]),
        (("--config", tmp_path / "type.yaml"), ["hidden_dim", "'wide'"]),
        (("--output_dir", "/proc/run"), ["/proc/run"]),
    ]
    script = ROOT / "train_scripts" / "train_points.py"
    for argv, fragments in cases:
        assert_one_line_error(run_forked("train_points", *output, *argv), *fragments)
    assert not list((tmp_path / "run").glob("*.json"))
    assert_one_line_error(run_forked("train_points"), "--output_dir")
    assert_one_line_error(run(*LAUNCH, script, *output, "--dataset", "hart"), "unknown data set 'hart'")
