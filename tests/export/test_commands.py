"""The commands for export and sampling, as a user runs them."""

import configparser
import functools
import json
import resource
import shutil
import sys
import textwrap

import numpy as np
import pytest
from diffusers import DDPMScheduler
from helpers import ROOT, SCRIPTS, assert_one_line_error, peak_memory
from PIL import Image

from ddpm_mlp_pipeline import DDPMMLPPipeline, MLPModel, OnnxSampler, export_bundle, pretrained

BASE_INSTALL = """
import sys
BLOCKED = {"torch", "diffusers", "onnx", "onnxscript", "accelerate", "datasets", "safetensors", "transformers",
           "huggingface_hub", "matplotlib", "pandas", "pyarrow", "scipy", "yaml", "ot"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])
sys.meta_path.insert(0, Absent())
"""
SAMPLE = BASE_INSTALL + "from ddpm_mlp_pipeline.commands.sample import main; sys.exit(main())"


@pytest.mark.parametrize("suffix", [".png", ".npy", ".csv"])
def test_sampling_needs_only_the_base_install(run, ddim_bundle, tmp_path, suffix):
    output = tmp_path / f"heart{suffix}"
    result = run(
        *(sys.executable, "-c", SAMPLE, ddim_bundle, "--num_samples", 2000, "--seed", 3, "--batch_size", 512),
        *("--output", output),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{output}: 2000 points\n"
    assert "100%" in result.stderr
    expected = OnnxSampler(ddim_bundle).sample(2000, seed=3)
    if suffix == ".npy":
        np.testing.assert_allclose(np.load(output), expected, atol=1e-5)
    elif suffix == ".csv":
        assert output.read_text().startswith("x,y\n")
        np.testing.assert_allclose(np.loadtxt(output, delimiter=",", skiprows=1), expected, atol=1e-5)
    else:
        picture = np.asarray(Image.open(output)).astype(int)
        ink = (picture != 255).any(axis=2)
        assert 0.02 < ink.mean() < 0.3
        assert not ink[330:470, 330:470].any()  # the heart is a curve: its inside is empty


def test_names_of_missing_extras_say_what_to_install(run):
    code = BASE_INSTALL + "import ddpm_mlp_pipeline; ddpm_mlp_pipeline."
    for name, module, extra in [
        ("MLPModel", "torch", "train"),
        ("DDPMMLPPipeline", "diffusers", "train"),
        ("train", "torch", "train"),
        ("load_points", "pandas", "train"),
        ("compile_scheduler", "diffusers", "export"),
        ("export_bundle", "diffusers", "export"),
    ]:
        result = run(sys.executable, "-c", code + name)
        last = result.stderr.splitlines()[-1]
        assert f"{name} needs {module}, which is not installed: pip install 'ddpm-mlp-pipeline[{extra}]'" in last
    assert run(sys.executable, "-c", code + "OnnxSampler").returncode == 0


@pytest.mark.parametrize("script", ["train_points.py", "train_images.py", "tune.py"])
def test_training_without_its_extra_says_what_to_install(run, script):
    code = (
        BASE_INSTALL + f"import runpy; runpy.run_path({str(ROOT / 'train_scripts' / script)!r}, run_name='__main__')"
    )
    assert_one_line_error(run(sys.executable, "-c", code), "pip install 'ddpm-mlp-pipeline[train]'")


def test_every_command_without_its_extra_says_what_to_install(run, tmp_path):
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    entries = dict(line.split(" = ") for line in config["options.entry_points"]["console_scripts"].split("\n") if line)
    for name, entry in entries.items():
        assert entry.endswith(f".console:{name.removeprefix('ddpm-')}")
        assert (SCRIPTS / name).exists()
    heart, output = str(pretrained("heart")), str(tmp_path / "out.npy")
    argv = {
        "ddpm-export": [heart, output],
        "ddpm-sample": [heart, "--output", output],
        "ddpm-benchmark": [heart, output],
        "ddpm-compare": [heart, "--dataset", "mnist", "--output", str(tmp_path / "out.json")],
        "ddpm-evaluate": [heart, "--dataset", "heart"],
    }
    code = """
        import importlib, json
        entries, argv = map(json.loads, sys.argv[1:])
        for name, entry in entries.items():
            module, _, attribute = entry.partition(":")
            print(name, file=sys.stderr)
            try:
                getattr(importlib.import_module(module), attribute)(argv.get(name, []))
            except SystemExit as end:
                assert end.code == 1
            else:
                print("it ran", file=sys.stderr)
    """
    result = run(sys.executable, "-c", BASE_INSTALL + textwrap.dedent(code), json.dumps(entries), json.dumps(argv))
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    assert lines[::2] == list(entries)
    for name, line in zip(lines[::2], lines[1::2], strict=True):
        assert line.startswith("error: "), name
        assert "which is not installed: pip install 'ddpm-mlp-pipeline[" in line, (name, line)


@pytest.mark.parametrize("module", ["bound", "doctor", "plot", "train_points", "train_images"])
def test_modules_import_or_raise_an_import_error(run, module):
    code = f"try:\n    import ddpm_mlp_pipeline.commands.{module}\nexcept ImportError as error:\n    print(error)"
    result = run(sys.executable, "-c", BASE_INSTALL + code)
    assert (result.returncode, result.stderr) == (0, "")
    assert "pip install 'ddpm-mlp-pipeline[train]'" in result.stdout
    # Run as a program, it ends with one line.
    code = BASE_INSTALL + f"import runpy; runpy.run_module('ddpm_mlp_pipeline.commands.{module}', run_name='__main__')"
    assert_one_line_error(run(sys.executable, "-c", code), "pip install 'ddpm-mlp-pipeline[train]'")


def test_evaluation_without_its_extra_says_what_to_install(run, ddim_bundle):
    code = BASE_INSTALL + "from ddpm_mlp_pipeline.commands.evaluate import main; sys.exit(main())"
    result = run(sys.executable, "-c", code, ddim_bundle, "--dataset", "heart")
    assert_one_line_error(result, "pip install 'ddpm-mlp-pipeline[evaluate]'")


def test_export_without_its_extra_says_what_to_install(run, tmp_path):
    code = BASE_INSTALL + "from ddpm_mlp_pipeline.commands.export import main; sys.exit(main())"
    result = run(sys.executable, "-c", code, pretrained("heart"), tmp_path / "bundle")
    assert_one_line_error(result, "pip install 'ddpm-mlp-pipeline[export]'")


def test_export_from_a_checkout_and_sample(run, tmp_path):
    bundle = tmp_path / "bundle"
    argv = (pretrained("heart"), bundle, "--scheduler", "ddpm", "--num_inference_steps", 10)
    result = run(sys.executable, "-m", "export", *argv, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "largest difference between pipeline and bundle" in result.stdout
    assert result.stdout.splitlines()[-1].startswith(f"{bundle}: DDPMScheduler, 10 network calls")
    assert result.stderr == ""
    assert run("ddpm-sample", bundle, "--output", tmp_path / "one.npy").returncode == 0
    assert np.load(tmp_path / "one.npy").shape == (1, 2)


@pytest.mark.slow
def test_the_benchmark_of_guidance_and_of_another_network(run_forked, ddim_bundle, tmp_path):
    """The checkpoint predicts its variance, and was trained with 40 timesteps: fewer than the default steps."""
    network = MLPModel(2, hidden_dim=8, out_channels=4, num_class_embeds=2)
    scheduler = DDPMScheduler(40, beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
    DDPMMLPPipeline(network, scheduler).save_pretrained(tmp_path / "checkpoint")
    bundle = tmp_path / "bundle"
    export_bundle(tmp_path / "checkpoint", bundle, "ddim", 6)
    argv = ("benchmark", tmp_path / "checkpoint", bundle)
    asked = ("--guidance_scale", 2, "--guidance_interval", 40, 20, "--against", ddim_bundle)
    result = run_forked(*argv, "--repeats", 1, "--batch_sizes", 1, 500, *asked)
    assert result.returncode == 0, result.stderr
    sampling, calls = result.stdout.split("\n\n")
    head, columns, *rows = sampling.splitlines()
    assert "onnxruntime" in head
    assert columns.split() == ["torch", "bundle", "ratio"]
    assert len(rows) == 6
    assert "one at a time, 40 DDPM steps, ms per sample" in rows[0]
    assert sum("40 DDPM steps against 6 DDIM steps" in row for row in rows) == 2
    assert "process start to picture of 2000, 40 DDIM steps, s" in rows[4]
    assert all(row.endswith("×") for row in rows)
    head, _, guidance, _, network, share = calls.splitlines()
    assert "G multiply-adds" in share
    assert head.split() == ["ms", "per", "step", "without", "with", "ratio"]
    assert guidance.startswith("guidance 2, 500 together")
    *_, without, guided, ratio = guidance.split()
    assert float(ratio[:-1]) == pytest.approx(float(guided) / float(without), rel=3e-3)
    assert str(ddim_bundle) in network
    assert_one_line_error(run_forked(*argv, "--num_inference_steps", 41), "from 1 to 40")
    assert_one_line_error(run_forked(*argv, "--guidance_interval", 9, 1), "needs --guidance_scale")
    argv = ("benchmark", pretrained("heart"), ddim_bundle)
    assert_one_line_error(run_forked(*argv, "--guidance_scale", 2), "guidance_scale")


def test_the_benchmark_compares_a_bundle_with_its_own_checkpoint(run_forked, ddim_bundle):
    result = run_forked("benchmark", pretrained("swiss_roll"), ddim_bundle)
    assert_one_line_error(result, "was not exported from this checkpoint")


def test_wrong_samplings_end_in_one_line(run_forked, ddim_bundle, tmp_path):
    ok = tmp_path / "a.png"
    for argv, fragments in [
        ((ddim_bundle, "--num_samples", 0, "--output", ok), ["--num_samples", "at least 1"]),
        ((ddim_bundle, "--num_samples", -2, "--output", ok), ["--num_samples", "at least 1"]),
        ((ddim_bundle, "--num_samples", 10**6 + 1, "--output", ok), ["1,000,000 points at most", ".npy"]),
        (
            (ddim_bundle, "--num_samples", 2**32 + 1, "--output", ok.with_suffix(".npy")),
            ["a seed has 4294967296 samples"],
        ),
        ((ddim_bundle, "--num_samples", "many", "--output", ok), ["--num_samples", "'many'"]),
        ((ddim_bundle, "--batch_size", 0, "--output", ok), ["--batch_size"]),
        ((ddim_bundle, "--seed", -1, "--output", ok), ["--seed"]),
        ((ddim_bundle, "--seed", 2**63, "--output", ok), ["--seed"]),
        ((ddim_bundle,), ["--output"]),
        ((ddim_bundle, "--output", tmp_path / "a.jpeg"), [".png, .npy, .csv or .parquet"]),
        ((ddim_bundle, "--output", tmp_path / "none" / "a.png"), ["no such folder"]),
        ((ddim_bundle, "--output", tmp_path / "cwd"), ["a folder is for images"]),
        ((ddim_bundle, "--output", "/proc/a.png"), ["/proc/a.png"]),
        ((tmp_path / "nowhere", "--output", ok), ["there is no folder"]),
        ((tmp_path / "cwd", "--output", ok), ["is not a bundle"]),
        ((ddim_bundle, "--output", tmp_path / "folder"), ["a folder is for images"]),
        ((ddim_bundle, "--output", ok, "--scheduler", "ddpm"), ["step table"]),
        ((pretrained("heart"), "--output", ok, "--num_inference_steps", 5), ["no table of 5 calls"]),
        (
            (pretrained("heart"), "--scheduler", "ddim", "--output", ok, "--num_inference_steps", 1001),
            ["from 1 to 1000"],
        ),
    ]:
        assert_one_line_error(run_forked("sample", *argv), *fragments)
    assert [path.name for path in tmp_path.iterdir()] == ["cwd"]
    assert not list((tmp_path / "cwd").iterdir())


def test_a_checkpoint_is_sampled_with_torch(run_forked, tmp_path):
    argv = (pretrained("heart"), "--num_samples", 30, "--scheduler", "ddim", "--num_inference_steps", 20)
    for batch_size in (7, 30):
        result = run_forked("sample", *argv, "--batch_size", batch_size, "--output", tmp_path / f"{batch_size}.npy")
        assert result.returncode == 0, result.stderr
    points = np.load(tmp_path / "30.npy")
    assert points.shape == (30, 2)
    np.testing.assert_allclose(np.load(tmp_path / "7.npy"), points, atol=1e-5)
    assert np.abs(np.linalg.norm(points, axis=1) - 0.9).max() < 0.7  # on the heart, or near it


def limit_file_size(size):
    """Make a write fail halfway, as on a full disk. (This does not need root.)"""
    return functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("suffix", [".png", ".npy", ".csv"])
def test_a_full_disk_leaves_no_half_written_samples(run, ddim_bundle, tmp_path, suffix):
    output = tmp_path / f"heart{suffix}"
    output.write_text("old")
    argv = ("--num_samples", 3000, "--output", output, "--overwrite")
    result = run("ddpm-sample", ddim_bundle, *argv, preexec_fn=limit_file_size(4096))
    assert_one_line_error(result, f"{output}: can't be written")
    assert output.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"cwd", output.name}


def test_a_full_disk_leaves_no_half_written_bundle(run_forked, tmp_path):
    argv = ("export", pretrained("heart"), tmp_path / "bundle")
    assert_one_line_error(run_forked(*argv, first=limit_file_size(100_000)))
    assert [path.name for path in tmp_path.iterdir()] == ["cwd"]


# With a cosine schedule, some steps round to the same timestep.
KARRAS = ("--scheduler", "unipc", "--num_inference_steps", 20, "--scheduler_options", "use_karras_sigmas=true")


def test_wrong_exports_end_in_one_line(run_forked, tmp_path):
    damaged = shutil.copytree(pretrained("heart"), tmp_path / "damaged")
    (damaged / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    bundle = tmp_path / "bundle"
    for argv, fragments in [
        ((tmp_path / "nowhere", bundle), ["nowhere doesn't exist"]),
        ((damaged, bundle), ["can't load the checkpoint", "diffusion_pytorch_model.safetensors"]),
        ((pretrained("heart"), bundle, "--num_inference_steps", 5), ["no table of 5 calls"]),
        ((pretrained("heart"), bundle, "--scheduler", "ddim", "--num_inference_steps", 1001), ["from 1 to 1000"]),
        ((pretrained("heart"), bundle, "--num_inference_steps", 0), ["at least 1"]),
        ((pretrained("heart"), bundle, "--scheduler", "magic"), ["magic", "ddpm"]),
        ((pretrained("heart"), bundle, *KARRAS), ["UniPC", "can't take 20 steps with these options"]),
        ((pretrained("heart"), damaged), ["left alone"]),
        ((pretrained("heart"), "/proc/bundle"), ["/proc/bundle"]),
    ]:
        assert_one_line_error(run_forked("export", *argv), *fragments)
    assert not bundle.exists()


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """10,000 images of 12 KiB are streamed to the disk. In memory, they would take 117 MiB."""
    DDPMMLPPipeline(MLPModel(3, 32, hidden_dim=8), DDPMScheduler()).save_pretrained(tmp_path / "checkpoint")
    export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", "ddim", 1)
    peaks = []
    for number in (1_000, 10_000):
        argv = (tmp_path / "bundle", "--num_samples", number, "--output", tmp_path / f"{number}.npy")
        peaks.append(peak_memory(SCRIPTS / "ddpm-sample", *argv))
    assert (tmp_path / "10000.npy").stat().st_size > 117 * 2**20
    assert peaks[1] - peaks[0] < 20
