"""Malicious and damaged files: loading runs none of their code, stays in their folder, checks sizes before it takes
memory, and ends well or in one of the package's errors."""

import contextlib
import dataclasses
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from fuzz_files import CODE, GOOD, TARGETS, make_case, make_originals, run_cases
from helpers import Payload, assert_one_line_error
from safetensors.torch import load_file, save_file

from ddpm_mlp_pipeline import DDPMMLPPipeline, OnnxSampler, StepTable, load_checkpoint, load_points, pretrained
from ddpm_mlp_pipeline.errors import BundleError, CheckpointError, DatasetError, DDPMPipelineError, DivergenceError
from ddpm_mlp_pipeline.figures import reverse_process
from ddpm_mlp_pipeline.judge.features import load_features
from ddpm_mlp_pipeline.judge.sources import open_source
from ddpm_mlp_pipeline.runtime.bundle import seal
from ddpm_mlp_pipeline.sampling import open_sampler

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    make_originals(root)
    return root


@pytest.fixture
def marker(tmp_path):
    """A path that exists once the checkpoint's code has run."""
    return tmp_path / "code-has-run"


@pytest.fixture
def checkpoint(heart, tmp_path, marker):
    """A checkpoint with code in every possible place: next to it, in each folder, and pickled in place of weights."""
    folder = tmp_path / "checkpoint"
    heart.save_pretrained(folder)
    for place in (tmp_path, folder, folder / "unet", folder / "scheduler"):
        for name in ("pipeline", "mlp", "evil", "__init__"):
            (place / f"{name}.py").write_text(CODE.format(marker=str(marker)) + "class MLPModel: pass\n")
        for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.pt", "scheduler.bin"):
            (place / name).write_bytes(pickle.dumps(Payload(marker)))
    return folder


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


NAMES = [
    *(["evil", "MLPModel"], ["../evil", "MLPModel"], ["unet.evil", "MLPModel"], ["mlp", "Another"]),
    *(["subprocess", "Popen"], ["torch", "load"], ["os", "system"], ["builtins", "exec"], ["antigravity", "Fly"]),
    *(["diffusers", "DiffusionPipeline"], ["diffusers", "DDPMPipeline"], ["diffusers", "OnnxRuntimeModel"]),
    *(["diffusers", "AutoModel"], ["diffusers", "utils"], ["diffusers.utils", "deprecate"], ["diffusers", None]),
    *(["ddpm", "DDPMPipeline"], ["stable_diffusion", "StableDiffusionPipeline"], ["transformers", "AutoModel"]),
    *("evil", None, 5, [], ["diffusers"], [["evil"], "MLPModel"], {"evil": "MLPModel"}),
]


@pytest.mark.parametrize("entry", ["unet", "scheduler"])
@pytest.mark.parametrize("name", NAMES, ids=str)
def test_model_index_can_name_models_and_schedulers_only(checkpoint, marker, entry, name):
    modules = set(sys.modules)
    edit_json(checkpoint / "model_index.json", **{entry: name})
    for load in (DDPMMLPPipeline.load_config, DDPMMLPPipeline.from_pretrained):
        with pytest.raises(ValueError, match=entry):
            load(checkpoint)
    with pytest.raises(CheckpointError, match=entry):
        load_checkpoint(checkpoint)
    assert not marker.exists()
    assert not {"antigravity", "evil"} & (set(sys.modules) - modules)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        *({"_class_name": name} for name in (["evil", "Evil"], ["../evil", "Evil"], ["pipeline", "Evil"], "Evil")),
        *({name: ["evil", "MLPModel"]} for name in ("safety_checker", "vae", "data_mean", "data_columns")),
        {"auto_map": {"AutoModel": "evil.MLPModel"}, "_module": "evil", "custom_pipeline": "evil"},
        {"_ignore_files": ["pipeline.py"], "trust_remote_code": True, "use_safetensors": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("load", [DDPMMLPPipeline.from_pretrained, load_checkpoint])
def test_a_checkpoints_code_runs_by_no_name(checkpoint, marker, load, changes):
    edit_json(checkpoint / "model_index.json", **changes)
    for config in (Path("unet") / "config.json", Path("scheduler") / "scheduler_config.json"):
        edit_json(checkpoint / config, _module="evil", _auto_map="evil.MLPModel")
    with contextlib.suppress(ValueError) if {"_class_name", "data_mean"} & {*changes} else contextlib.nullcontext():
        load(checkpoint)
    assert not marker.exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    "config", [{"quantization_config": {"quant_method": "bitsandbytes"}}, {"_class_name": "Evil"}]
)
def test_a_networks_configuration_can_not_bring_other_code(checkpoint, marker, config):
    edit_json(checkpoint / "unet" / "config.json", **config)
    with contextlib.suppress(CheckpointError):
        assert type(load_checkpoint(checkpoint).unet).__module__ == "ddpm_mlp_pipeline.models.mlp"
    assert not marker.exists()


def test_pickles_are_refused(checkpoint, marker, tmp_path):
    weights = load_file(checkpoint / WEIGHTS)
    (checkpoint / WEIGHTS).unlink()
    torch.save(weights, checkpoint / "unet" / "diffusion_pytorch_model.bin")  # harmless, but loading can't know that
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "diffusion_pytorch_model.bin")}
    for name in ("none", "diffusion_pytorch_model.safetensors.index.json"):
        (checkpoint / "unet" / name).write_text(json.dumps(index))
        with pytest.raises((OSError, ValueError), match=r"safetensors|several files"):
            DDPMMLPPipeline.from_pretrained(checkpoint)
        with pytest.raises(CheckpointError):
            load_checkpoint(checkpoint)
    with pytest.raises(CheckpointError):
        load_features(checkpoint / "unet")

    for path in (tmp_path / "points.npy", tmp_path / "points.pt"):
        np.save(path.open("wb"), np.array([[Payload(marker)] * 2] * 2), allow_pickle=True)
        with pytest.raises(DatasetError):
            load_points(path)
        with pytest.raises(DDPMPipelineError):
            open_source(path)
        path.write_bytes(pickle.dumps(Payload(marker)))
        with pytest.raises(DatasetError):
            load_points(path)
    assert not marker.exists()


@pytest.mark.parametrize("place", ["weights.bin", "../weights.bin", "{folder}/weights.bin", "link.bin", "/dev/zero"])
def test_paths_lead_nowhere(ddim_bundle, checkpoint, tmp_path, monkeypatch, place):
    """Weights in a second file are refused, whether it is in the folder or outside."""
    folder = shutil.copytree(ddim_bundle, tmp_path / "bundle")
    model = onnx.load(folder / "unet.onnx")
    onnx.save(model, folder / "unet.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    shutil.copy(folder / "weights.bin", tmp_path)
    (folder / "link.bin").symlink_to(tmp_path / "weights.bin")
    model = onnx.load(folder / "unet.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = place.format(folder=tmp_path)
    (folder / "unet.onnx").write_bytes(model.SerializeToString())
    seal(folder)
    monkeypatch.chdir(folder)  # the default place for weights of a network loaded from memory
    with pytest.raises(BundleError, match="location"):
        OnnxSampler(folder)

    shutil.copy(checkpoint / WEIGHTS, tmp_path / "weights.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(checkpoint / WEIGHTS), place)}
    (checkpoint / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="several files"):
        load_checkpoint(checkpoint)


def test_a_hubs_snapshot_of_links_loads(ddim_bundle, heart, tmp_path):
    """In the hub's cache, a snapshot consists of links to files in another folder."""
    heart.save_pretrained(tmp_path / "checkpoint")
    shutil.copytree(ddim_bundle, tmp_path / "bundle")
    for source in [path for path in tmp_path.rglob("*") if path.is_file()]:
        link = tmp_path / "snapshot" / source.relative_to(tmp_path)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(source, link.parent))
    assert load_checkpoint(tmp_path / "snapshot" / "checkpoint").is_points
    assert OnnxSampler(tmp_path / "snapshot" / "bundle").is_points


def edited(originals, target, name, **changes):
    return (
        target,
        name,
        json.dumps(json.loads((originals / "originals" / target / name).read_text()) | changes).encode(),
    )


def test_sizes_are_checked_before_memory_is_taken(originals):
    """Each of these would take gigabytes or hours. In a process with 2 GiB, they are refused."""
    cases = [
        edited(originals, target, "unet/config.json", **{name: size})
        for target, names in (
            ("heart", ("hidden_dim", "num_hidden_layers", "embedding_dim", "in_channels", "sample_size")),
            ("digits", ("sample_size", "in_channels", "patch_size", "layers_per_block", "out_channels")),
        )
        for name in names
        for size in (10**4, 10**9)
    ]
    cases += [
        edited(originals, "heart", "scheduler/scheduler_config.json", num_train_timesteps=10**9),
        edited(originals, "heart", "scheduler/scheduler_config.json", num_train_timesteps=-(10**9)),
        edited(originals, "mnist_features", "config.json", block_out_channels=[1] * 10**5),
        edited(originals, "bundle", "bundle.json", sample_shape=[10**9]),
    ]
    table = json.loads((originals / "originals" / "step table" / "step_table.json").read_text())
    step = table["steps"][-1]
    long = table | {"steps": [step] * 20_000 + [step | {"to_next": [[0, 0, 0, 0]] * 20_000}]}
    cases += [("step table", "step_table.json", json.dumps(long).encode())]
    header = b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
    cases += [("heart", str(WEIGHTS), size.to_bytes(8, "little") + header) for size in (len(header), 2**60, 2**64 - 1)]
    levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    merged = "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))
    cases += [
        ("preset", "preset.yaml", f"a0: &a0 {first}\n{rest}".encode())
        for first, rest in (("[x]", levels), ("{x: y}", merged))
    ]
    for case, end, message in run_cases(originals, cases):
        assert end == "refused", (case[:2], end, message)


def test_damaged_files_end_well_or_in_an_error_of_ours(originals):
    """A short run of `python tests/fuzz_files.py` with another seed."""
    cases = [make_case(originals, number, seed=12345) for number in range(13 * len(TARGETS))]
    for case, end, message in run_cases(originals, cases):
        assert end in GOOD, (case[:2], end, message)


def test_every_flipped_bit_of_network_and_table_is_found(ddim_bundle, tmp_path):
    folder = shutil.copytree(ddim_bundle, tmp_path / "bundle")
    rng = np.random.default_rng(0)
    for name in ("unet.onnx", "step_table.json"):
        content = bytearray((folder / name).read_bytes())
        for place in rng.integers(8 * len(content), size=20).tolist():
            content[place // 8] ^= 1 << place % 8
            (folder / name).write_bytes(content)
            with pytest.raises(BundleError, match=f"{name} is damaged"):
                OnnxSampler(folder)
            content[place // 8] ^= 1 << place % 8
        (folder / name).write_bytes(content)
    OnnxSampler(folder)


def test_files_of_another_bundle_are_found(ddim_bundle, ddpm_bundle, tmp_path):
    folder = shutil.copytree(ddim_bundle, tmp_path / "bundle")
    shutil.copy(ddpm_bundle / "step_table.json", folder)
    with pytest.raises(BundleError, match="damaged or from another bundle"):
        OnnxSampler(folder)


def test_files_of_another_checkpoint_are_refused_where_they_do_not_fit(heart, tmp_path):
    from ddpm_mlp_pipeline import MLPModel

    heart.save_pretrained(tmp_path / "heart")
    folders = {}
    for name, model in {
        "wider": MLPModel(hidden_dim=80),
        "deeper": MLPModel(num_hidden_layers=5),
        "of more coordinates": MLPModel(3),
        "of images": MLPModel(1, (2, 2)),
    }.items():
        DDPMMLPPipeline(model, heart.scheduler).save_pretrained(tmp_path / name)
        for file in (WEIGHTS, WEIGHTS.with_name("config.json")):
            folders[name, file] = shutil.copytree(tmp_path / "heart", tmp_path / f"heart with {name} {file.name}")
            shutil.copy(tmp_path / name / file, folders[name, file] / file)
    for folder in folders.values():
        with pytest.raises(CheckpointError, match="configuration"):
            load_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights["proj_out.bias"].fill_(torch.nan), "not finite"),
        (lambda weights: weights.pop("proj_out.bias"), "lack"),
        (lambda weights: weights.update(another=torch.zeros(2)), "lack"),
        (lambda weights: weights.update({"proj_out.bias": torch.zeros(2, dtype=torch.int32)}), "lack"),
        (lambda weights: weights.update(proj_out_bias=weights.pop("proj_out.bias")), "lack"),
    ],
)
def test_weights_that_are_not_the_networks_are_refused(heart, tmp_path, change, message):
    heart.save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    change(weights)
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"data_mean": [1.0]}, "2 numbers"),
        ("model_index.json", {"data_mean": None}, "can't load"),
        ("model_index.json", {"data_std": [1.0, 0.0]}, "2 numbers"),
        ("model_index.json", {"data_std": [1.0, float("inf")]}, "finite"),
        ("model_index.json", {"class_names": [["a", "b"]], "class_shares": [1.0]}, "2 numbers that sum to 1"),
        ("model_index.json", {"class_names": [["a", "b"]], "class_shares": [1.5, -0.5]}, "2 numbers that sum to 1"),
        ("model_index.json", {"class_names": [["a", "b"]], "class_shares": "halves"}, "can't load"),
        ("unet/config.json", {"hidden_dims": 64}, "'hidden_dims', which MLPModel does not know"),
        ("unet/config.json", {"sample_size": "large"}, "can't load"),
        ("scheduler/scheduler_config.json", {"prediction_type": "noise"}, "prediction_type"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "linear", "beta_end": float("nan")}, "finite"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "can't load"),
    ],
)
def test_options_that_can_not_be_sampled_with_are_refused(heart, tmp_path, file, changes, message):
    heart.save_pretrained(tmp_path)
    edit_json(tmp_path / file, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


def test_loading_leaves_the_random_numbers_alone():
    torch.manual_seed(0)
    load_checkpoint(pretrained("heart"))
    torch.testing.assert_close(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def exploding(heart, tmp_path):
    """A checkpoint with finite weights, with which sampling soon overflows."""
    with torch.no_grad():
        for block in heart.unet.blocks:
            block.linear.weight.mul_(1e12)
    heart.save_pretrained(tmp_path / "exploding")
    return tmp_path / "exploding"


def test_sampling_that_leaves_the_finite_numbers_says_where(ddim_bundle, exploding):
    sampler = OnnxSampler(ddim_bundle, num_threads=2)
    to_next = sampler.table.to_next.copy()
    to_next[7:, 0, 0] = 1e30  # coefficient of x: the second such step overflows float32
    sampler.table = dataclasses.replace(sampler.table, to_next=to_next)
    assert all(np.isfinite(step.sample).all() == (step.index < 8) for step in sampler.steps(3))
    message = rf"step 8 .* timestep {sampler.table.timesteps[8]:g}"
    for arguments in ((3,), (100, 0, 10)):
        with pytest.raises(DivergenceError, match=message):
            sampler.sample(*arguments)

    with pytest.raises(DivergenceError, match=r"step 0 .* timestep 900"):
        next(open_sampler(exploding, "ddim", 10).batches(3))
    with pytest.raises(DivergenceError, match=r"step 0 .* timestep 999"):
        reverse_process(load_checkpoint(exploding), 3, seed=0)


def test_the_commands_say_in_one_line_where_sampling_goes_wrong(run, run_forked, ddim_bundle, exploding, tmp_path):
    folder = shutil.copytree(ddim_bundle, tmp_path / "bundle")
    table = StepTable.load(folder / "step_table.json")
    table.to_next[7:, 0, 0] = 1e30
    table.save(folder / "step_table.json")
    seal(folder)
    argv = (folder, "--num_samples", 3, "--output", tmp_path / "points.npy")
    assert_one_line_error(run("ddpm-sample", *argv), "not finite after step 8", "timestep")
    assert not (tmp_path / "points.npy").exists()
    argv = (exploding, "--dataset", "heart", "--num_samples", 10, "--num_inference_steps", 10)
    assert_one_line_error(run_forked("evaluate", *argv), "not finite after step 0", "timestep 900")
