"""Commands never delete or replace files of others, and replace their own only if told to."""

import json
import os
import shutil
import sys

import forked
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from helpers import ROOT, assert_one_line_error
from small_training import train_small, training_options

from ddpm_mlp_pipeline import DDPMMLPPipeline, MLPModel, export_bundle, pretrained
from ddpm_mlp_pipeline.commands import benchmark_training, train_features, train_images, train_points
from ddpm_mlp_pipeline.commands.bound import main as bound
from ddpm_mlp_pipeline.commands.compare import main as compare
from ddpm_mlp_pipeline.commands.export import main as export
from ddpm_mlp_pipeline.commands.plot import main as plot
from ddpm_mlp_pipeline.data.batches import TensorBatches
from ddpm_mlp_pipeline.errors import OutputExistsError
from ddpm_mlp_pipeline.judge.likelihood import variational_bound
from ddpm_mlp_pipeline.training.run import check_output_dir


def contents(folder):
    """Return the content of a folder, by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def taken(tmp_path):
    """A folder of somebody's files with the names of every kind of output."""
    folder = tmp_path / "taken"
    files = ("a.png", "a.npy", "a.csv", "a.json", "keep/notes.txt", "keep/1.png", "pictures/0.png", "page/index.html")
    # The right names with other content:
    files += ("bundle/bundle.json", "bundle/unet.onnx/thesis.tex", "web/page.js", "web/bundle/thesis.tex")
    files += ("golden/ddim_10.json", "run/README.md", "figures/loss.png", "unet/unet/mine.py", "net/config.json")
    files += ("runs/benchmark.json", "variant/1/scheduler/mine.json")
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("somebody's")
    return folder


LEFT_ALONE, EXISTS = "it is left alone", "exists: pass --overwrite to replace it"
NOT_EMPTY, RUN_EXISTS = "exists and isn't empty: pass --overwrite", "exists: pass --overwrite_output_dir"
DATA, IMAGES = ("--dataset", "nowhere"), ("--dataset_name", "nowhere", "--output_dir")


# The commands' inputs don't exist: a command that starts its work would end in that error.


def test_what_is_in_the_way_is_refused_before_any_work(run, taken):
    golden = (sys.executable, ROOT / "export" / "golden.py")
    cases = [
        (("sample", "nowhere", "--output", "a.png"), ["a.png", EXISTS]),
        (("sample", "nowhere", "--output", "a.npy"), ["a.npy", EXISTS]),
        (("sample", "nowhere", "--output", "a.csv"), ["a.csv", EXISTS]),
        (("sample", "nowhere", "--output", "keep"), ["keep holds notes.txt", LEFT_ALONE]),
        (("sample", "nowhere", "--output", "keep", "--overwrite"), ["keep holds notes.txt", LEFT_ALONE]),
        (("sample", "nowhere", "--output", "pictures"), ["pictures", NOT_EMPTY]),
        (("export", "nowhere", "new", "--web", "page"), ["page", NOT_EMPTY]),
        (("export", "nowhere", "new", "--web", "web", "--overwrite"), ["bundle/thesis.tex", LEFT_ALONE]),
        (("evaluate", "nowhere", *DATA, "--output", "a.json"), ["a.json", EXISTS]),
        (("compare", "nowhere", *DATA, "--output", "new.json", "--figure", "a.png"), ["a.png", EXISTS]),
        ((*golden, "golden"), ["golden", NOT_EMPTY]),
        ((*golden, "keep", "--overwrite"), ["keep holds notes.txt", LEFT_ALONE]),
    ]
    before = contents(taken)
    for (command, *argv), fragments in cases:
        if command == sys.executable:
            result = run(command, *argv, cwd=taken)
        else:
            result = forked.Command(command, argv, taken).wait()
        assert_one_line_error(result, *fragments)
    assert contents(taken) == before


@pytest.mark.parametrize(
    ("main", "argv", "fragments"),
    [
        (export, ("nowhere", "bundle", "--overwrite"), ["bundle holds unet.onnx/", LEFT_ALONE]),
        (plot, ("samples", "nowhere", "--output", "a.png"), ["a.png", EXISTS]),
        (bound, ("nowhere", *DATA, "--output", "a.json"), ["a.json", EXISTS]),
        (bound, ("nowhere", *DATA, "--output", "new.json", "--figure", "a.png"), ["a.png", EXISTS]),
        (compare, ("nowhere", *DATA, "--output", "a.json", "--overwrite"), ["a.json does not hold what"]),
        (train_points.main, (*DATA, "--output_dir", "run"), ["run/README.md", RUN_EXISTS]),
        (train_points.main, (*DATA, "--output_dir", "unet"), ["unet/unet", RUN_EXISTS]),
        (train_images.main, (*IMAGES, "figures"), ["figures/loss.png", RUN_EXISTS]),
        (train_features.main, (*IMAGES, "net"), ["net/config.json", RUN_EXISTS]),
        (benchmark_training.main, ("mnist", *IMAGES, "runs"), ["runs/benchmark.json", RUN_EXISTS]),
        (benchmark_training.main, ("mnist", "mnist", *IMAGES, "variant"), ["variant/1/scheduler", RUN_EXISTS]),
    ],
)
def test_what_is_in_the_way_of_commands_with_torch_is_refused(taken, monkeypatch, capsys, main, argv, fragments):
    """The commands run in this process, since starting another takes seconds."""
    monkeypatch.chdir(taken)
    before = contents(taken)
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert all(fragment in line for fragment in fragments), line
    assert contents(taken) == before


@pytest.fixture
def image_bundle(tmp_path):
    DDPMMLPPipeline(MLPModel(1, 8, hidden_dim=8), DDPMScheduler(10)).save_pretrained(tmp_path / "checkpoint")
    export_bundle(tmp_path / "checkpoint", tmp_path / "images-onnx", "ddim", 2)
    return tmp_path / "images-onnx"


def test_a_folder_of_samples_is_replaced_and_nothing_else(run, image_bundle, tmp_path):
    pictures = tmp_path / "pictures"
    sample = ("ddpm-sample", image_bundle, "--output", pictures, "--num_samples")
    assert run(*sample, 3).returncode == 0
    three = contents(pictures)
    assert_one_line_error(run(*sample, 11), "pictures exists and isn't empty: pass --overwrite to replace it")
    assert contents(pictures) == three
    result = run(*sample, 11, "--overwrite")
    assert result.returncode == 0, result.stderr
    assert sorted(contents(pictures)) == [f"{i:02}.png" for i in range(11)]
    (pictures / "best").mkdir()
    shutil.copy(pictures / "07.png", pictures / "best")
    chosen = contents(pictures)
    assert_one_line_error(run(*sample, 3, "--overwrite"), "pictures holds best/", "left alone")
    assert contents(pictures) == chosen


def test_files_are_replaced_where_that_is_asked_for(run, ddim_bundle, tmp_path):
    output = tmp_path / "points.npy"
    output.write_text("old")
    result = run("ddpm-sample", ddim_bundle, "--output", output, "--overwrite")
    assert result.returncode == 0, result.stderr
    assert np.load(output).shape == (1, 2)
    output = tmp_path / "table.png"
    output.write_text("old")
    plot(["table", str(ddim_bundle), "--output", str(output), "--overwrite"])
    assert output.read_bytes().startswith(b"\x89PNG")


def test_errors_of_reading_do_not_blame_the_output(run_forked, tmp_path):
    (tmp_path / "samples.csv").mkdir()  # not even root can read it as a file
    (tmp_path / "samples.npy").symlink_to(tmp_path / "samples.npy")  # nor this
    for name in ("samples.npy", "samples.csv"):
        argv = (tmp_path / name, "--dataset", "heart", "--output", tmp_path / "out.json")
        result = run_forked("evaluate", *argv)
        assert_one_line_error(result, name)
        assert "out.json" not in result.stderr


@pytest.mark.parametrize("world", [{"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}])
def test_a_bundles_samples_are_written_whatever_rank_the_environment_has(run, ddim_bundle, tmp_path, world):
    result = run("ddpm-sample", ddim_bundle, "--output", tmp_path / "a.npy", env=os.environ | world)
    assert result.stdout == f"{tmp_path / 'a.npy'}: 1 points\n"
    assert (tmp_path / "a.npy").exists()


def test_one_process_writes_a_checkpoints_samples_whatever_its_rank(run, tmp_path):
    argv = ("--num_inference_steps", 4, "--output", tmp_path / "a.npy")
    result = run("ddpm-sample", pretrained("heart"), *argv, env=os.environ | {"RANK": "1"})
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "a.npy").exists()


def test_a_measurement_is_not_measured_over(tmp_path, capsys):
    output, state = tmp_path / "bound.json", tmp_path / "bound.partial.npz"
    argv = [str(pretrained("heart")), "--dataset", "heart", "--num_samples", "20", "--timestep_stride", "20"]
    argv += ["--output", str(output)]
    state.write_text("somebody's")
    for flags in ([], ["--overwrite"]):
        with pytest.raises(SystemExit):
            bound([*argv, *flags])
        assert "is not the state of an estimate" in capsys.readouterr().err
    assert contents(tmp_path) == {state.name: b"somebody's"}
    state.unlink()
    bound(argv)
    finished = contents(tmp_path)
    assert list(finished) == [output.name]
    with pytest.raises(SystemExit):
        bound([*argv, "--seed", "2"])
    assert "bound.json exists: pass --overwrite to replace it" in capsys.readouterr().err
    assert contents(tmp_path) == finished
    bound([*argv, "--seed", "2", "--overwrite"])
    assert json.loads(output.read_text())["bound"] != json.loads(finished[output.name])["bound"]


def test_a_state_that_appears_during_a_measurement_stays(tmp_path):
    state = tmp_path / "bound.partial.npz"

    class Appearing(TensorBatches):
        def __getitems__(self, indices):
            if len(indices) == 4:  # the first batch: the check for a state is over
                state.write_text("somebody's")
            return super().__getitems__(indices)

    pipeline = DDPMMLPPipeline(MLPModel(2), DDPMScheduler(10))
    with pytest.raises(OutputExistsError, match=r"partial\.npz exists"):
        variational_bound(pipeline, Appearing(torch.zeros(4, 2)), state_path=state)
    assert state.read_text() == "somebody's"


def test_a_run_replaces_another_only_where_that_is_asked_for(tmp_path):
    first, _ = train_small(tmp_path)
    for name in ("notes.txt", "unet/notes.txt", "scheduler/notes.txt"):
        (tmp_path / name).write_text("somebody's")
    before = contents(tmp_path)
    for resume in (None, "latest"):  # there are no states
        with pytest.raises(OutputExistsError, match=r"model_index\.json exists: pass --overwrite_output_dir"):
            train_small(tmp_path, seed=1, resume_from_checkpoint=resume)
    assert contents(tmp_path) == before
    second, _ = train_small(tmp_path, seed=1, overwrite_output_dir=True)
    assert second != first
    after = contents(tmp_path)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"unet/diffusion_pytorch_model.safetensors"}


def test_a_run_that_goes_on_writes_its_result_and_leaves_notes(tmp_path):
    result = train_small(tmp_path / "run", checkpointing_steps=5)
    (tmp_path / "run" / "unet" / "notes.txt").write_text("somebody's")
    for name in ("latest", "checkpoint-10", str(tmp_path / "run" / "checkpoint-10")):
        (tmp_path / "run" / "unet" / "config.json").write_text("")
        assert train_small(tmp_path / "run", resume_from_checkpoint=name, checkpointing_steps=5) == result
    assert (tmp_path / "run" / "unet" / "notes.txt").read_text() == "somebody's"
    train_small(tmp_path / "other", seed=1)
    other = contents(tmp_path / "other")
    with pytest.raises(OutputExistsError):  # a state of another run
        train_small(tmp_path / "other", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
    assert contents(tmp_path / "other") == other


def test_samples_of_a_killed_run_do_not_prevent_a_new_start(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "epoch-0001.png").touch()
    check_output_dir(training_options(tmp_path))
    with pytest.raises(OutputExistsError, match="samples exists"):
        check_output_dir(training_options(tmp_path, save_samples_epochs=1))
    check_output_dir(training_options(tmp_path, save_samples_epochs=1, resume_from_checkpoint="latest"))


def test_only_states_that_the_run_saved_are_deleted(tmp_path):
    train_small(tmp_path, checkpointing_steps=2)
    (tmp_path / "checkpoint-1").mkdir()
    for name in ("checkpoint-1/model.txt", "checkpoint-4/notes.txt"):
        (tmp_path / name).write_text("somebody's")
    before = contents(tmp_path)
    train_small(tmp_path, checkpointing_steps=2, resume_from_checkpoint="latest", checkpoints_total_limit=1)
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-10",
        "checkpoint-4",
    ]
    after = contents(tmp_path)
    assert all(after[name] == before[name] for name in before if name.startswith(("checkpoint-1/", "checkpoint-4/")))
