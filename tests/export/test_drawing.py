"""Draws that are divided: ranges of samples, parts that survive a kill, Parquet files, Ray's workers."""

import contextlib
import signal
import subprocess
import time
from argparse import ArgumentTypeError

import numpy as np
import psutil
import pyarrow.parquet
import pytest
from datasets import load_dataset
from diffusers import DDPMScheduler
from helpers import SCRIPTS, assert_one_line_error, needs_mounts

from ddpm_mlp_pipeline import DDPMMLPPipeline, MLPModel, OnnxSampler, export_bundle, load_images, pretrained
from ddpm_mlp_pipeline.checkpoint_sampler import CheckpointSampler
from ddpm_mlp_pipeline.commands.parser import sample_range
from ddpm_mlp_pipeline.commands.sample import _explained
from ddpm_mlp_pipeline.errors import OutputExistsError
from ddpm_mlp_pipeline.judge.sources import open_source
from ddpm_mlp_pipeline.parts import Parts
from ddpm_mlp_pipeline.ray_engine import DrawBatch

OTHERS = {"draw.json", "lock"}  # files of a folder of parts
MANY = 900_000  # points: a part of 4 MiB, and a rest


@pytest.fixture(scope="module")
def quick_bundle(tmp_path_factory):
    """A bundle that draws millions of points in seconds."""
    folder = tmp_path_factory.mktemp("quick")
    network = MLPModel(2, hidden_dim=4, num_hidden_layers=1, embedding_dim=4)
    DDPMMLPPipeline(network, DDPMScheduler()).save_pretrained(folder / "checkpoint")
    export_bundle(folder / "checkpoint", folder / "bundle", "ddim", 2)
    return folder / "bundle"


@pytest.mark.parametrize("scheduler", ["ddpm", "dpmsolver_multistep", "kdpm2_ancestral", "unipc"])
def test_a_checkpoint_draws_the_samples_of_its_bundle(scheduler, tmp_path):
    """Whatever the stock scheduler draws its noise for; and of the labels, where none is asked for."""
    export_bundle(pretrained("moons"), tmp_path / "bundle", scheduler, 12)
    sampler, runtime = CheckpointSampler(pretrained("moons"), scheduler, 12), OnnxSampler(tmp_path / "bundle")
    numbers = range(2**32 - 9, 2**32 - 2)
    asks = [{}, {"class_labels": [0, 1, 2, 0, 1, 2, 0]}, {"guidance_scale": 2.0}]
    asks += [{"known": {"x": 0.5}}] if hasattr(sampler.pipeline.scheduler, "alphas_cumprod") else []
    for asked in asks:
        drawn = np.concatenate([*sampler.batches(numbers, 5, batch_size=3, **asked)])
        np.testing.assert_allclose(drawn, runtime.sample(numbers, 5, **asked), atol=1e-4)


def test_parts_of_what_is_asked_for(run_forked, labelled_points, tmp_path):
    """Classes and rows have their samples one after the other; a range is a part of all of them."""
    (tmp_path / "rows.csv").write_text("x,y\n1,\n2,\n,3\n")
    whole = ("sample", labelled_points, "--class_labels", "a", "3", "b b", "--known", tmp_path / "rows.csv")
    whole += ("--num_samples", 4)
    for name, more in {"whole": (), "first": ("--samples", "0:5"), "rest": ("--samples", "5:12")}.items():
        result = run_forked(*whole, *more, "--output", tmp_path / f"{name}.npy")
        assert result.returncode == 0, result.stderr
    all_of_them, *parts = (np.load(tmp_path / f"{name}.npy") for name in ("whole", "first", "rest"))
    np.testing.assert_array_equal(np.concatenate(parts), all_of_them)
    np.testing.assert_allclose(all_of_them[:8, 0], [1] * 4 + [2] * 4, atol=1e-6)
    output = ("--output", tmp_path / "a.npy")
    assert_one_line_error(run_forked(*whole, "--samples", "5:13", *output), "ends at 13, but 12 are asked for")
    assert_one_line_error(run_forked(*whole, "--samples", "5:5", *output), "--samples", "5:5 holds no samples")
    one = ("sample", labelled_points, *output)
    assert_one_line_error(run_forked(*one, "--samples", f"0:{2**32 + 1}"), "a seed has 4294967296 samples")
    assert_one_line_error(run_forked(*one, "--samples", "0:2", "--num_samples", 2), "not both")
    assert_one_line_error(run_forked(*one, "--address", "auto"), "--address needs --engine ray")


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("5", "is not FIRST:END"),
        ("5:2", "holds no samples"),
        ("-1:2", "holds no samples"),
        ("a:2", "'a' is not a whole number"),
    ],
)
def test_ranges_that_are_none(text, fragment):
    with pytest.raises(ArgumentTypeError, match=fragment):
        sample_range(text)


def test_parquet(run_forked, labelled_points, labelled_images, tmp_path):
    """Points are float32 columns of their names; pictures are what `datasets` loads as pictures."""
    for name, bundle in (("points", labelled_points), ("images", labelled_images)):
        for suffix in (".parquet", ".npy"):
            argv = ("sample", bundle, "--num_samples", 30, "--seed", 2, "--output", tmp_path / f"{name}{suffix}")
            assert run_forked(*argv).returncode == 0
    table = pyarrow.parquet.read_table(tmp_path / "points.parquet")
    assert [(field.name, field.type) for field in table.schema] == [(name, pyarrow.float32()) for name in ("x", "y")]
    np.testing.assert_array_equal(table.to_pandas(), np.load(tmp_path / "points.npy"))
    rows = load_dataset("parquet", data_files=str(tmp_path / "images.parquet"), split="train", cache_dir=str(tmp_path))
    pictures = np.stack([np.asarray(picture) for picture in rows["image"]])
    np.testing.assert_allclose(pictures / 255, np.load(tmp_path / "images.npy"), atol=0.5 / 255 + 1e-6)
    assert open_source(tmp_path / "points.parquet").shape == (2,)
    source = open_source(tmp_path / "images.parquet")
    assert (source.shape, source.number) == ((3, 6, 9), 30)
    np.testing.assert_array_equal(load_images(tmp_path / "images.parquet"), pictures.transpose(0, 3, 1, 2))


def start(*argv):
    words = [str(word) for word in (SCRIPTS / "ddpm-sample", *argv)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


@pytest.mark.slow
def test_a_draw_goes_on_from_its_parts(quick_bundle, run_forked, tmp_path):
    """After kill -9, the result is byte for byte that of one draw. Another draw, and a second process, are refused."""
    argv = (quick_bundle, "--num_samples", MANY, "--output")
    parts = tmp_path / "killed.parquet.parts"
    with start(*argv, tmp_path / "killed.parquet") as process:
        wait_for_part(parts, process)
        process.send_signal(signal.SIGSTOP)
        second = run_forked("sample", *argv, tmp_path / "killed.parquet")
        assert_one_line_error(second, f"{parts} is being written by another process")
        process.send_signal(signal.SIGKILL)
    assert_one_line_error(run_forked("sample", *argv, tmp_path / "killed.parquet", "--seed", 1), "other seed")
    for name in ("killed", "whole"):
        result = run_forked("sample", *argv, tmp_path / f"{name}.parquet")
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "killed.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not parts.exists()


def wait_for_part(parts, process):
    while not list(parts.glob("[0-9]*.npy")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def test_an_interrupted_draw_says_how_to_go_on(tmp_path):
    def stop():
        yield range(3), np.arange(3.0)
        parts._write()
        yield range(3, 5), np.arange(3.0, 5.0)
        raise KeyboardInterrupt

    with (
        Parts(tmp_path / "parts", range(10), lambda: {"seed": 0}) as parts,
        pytest.raises(KeyboardInterrupt) as interrupt,
    ):
        parts.add(stop())
    assert parts.gaps() == [range(5, 10)]
    message = f"5 of 10 samples are in {tmp_path / 'parts'}: the same command goes on from there"
    assert str(_explained(interrupt.value, parts, 10)) == f"interrupted; {message}"
    error = _explained(OSError(28, "can't be written: No space left on device", "a.npy"), parts, 10)
    assert (error.filename, error.strerror) == ("a.npy", f"can't be written: No space left on device; {message}")


def test_parts_may_come_in_any_order(tmp_path):
    rows = np.arange(10.0)
    with Parts(tmp_path / "parts", range(100, 110), lambda: {"seed": 0}) as parts:
        parts.add((range(100 + a, 100 + b), rows[a:b]) for a, b in [(6, 8), (0, 3), (3, 4)])
        parts._write()
        assert parts.gaps() == [range(104, 106), range(108, 110)]
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"100-104.npy", "106-108.npy", *OTHERS}
    with Parts(tmp_path / "parts", range(100, 110), lambda: {"seed": 0}) as parts:
        assert parts.num_saved == 6
        parts.add((gap, rows[gap.start - 100 : gap.stop - 100]) for gap in parts.gaps())
        np.testing.assert_array_equal(np.concatenate([*parts]), rows)
        parts.delete()
    assert not list(tmp_path.iterdir())


def write_parts(folder, *ranges, seed=0, number=10):
    with Parts(folder, range(number), lambda: {"seed": seed}) as parts:
        parts.add((range(a, b), np.arange(float(a), b)) for a, b in ranges)
        parts._write()


def test_two_draws_that_begin_together_do_not_mix(tmp_path):
    """The second finds the first's parts only when it writes its own: it is refused, and writes none."""
    folder = tmp_path / "parts"
    second = Parts(folder, range(10), lambda: {"seed": 0})
    write_parts(folder, (0, 4))
    with pytest.raises(OutputExistsError, match="another process"):
        second.add(refuse_after((range(3), np.arange(3.0)), second))
    assert {path.name for path in folder.iterdir()} == {"0-4.npy", *OTHERS}


def refuse_after(item, parts):
    yield item
    parts._write()


def test_damaged_parts_are_drawn_again(tmp_path):
    folder = tmp_path / "parts"
    write_parts(folder, (0, 3), (4, 6), (7, 9))
    (folder / "4-6.npy").write_bytes((folder / "4-6.npy").read_bytes()[:-3])  # as after a power failure
    np.save(folder / "8-10.npy", np.zeros(2))  # overlaps another
    with Parts(folder, range(10), lambda: {"seed": 0}) as parts:
        assert parts.gaps() == [range(3, 7), range(9, 10)]
    (folder / "draw.json").write_text("")
    with pytest.raises(OutputExistsError, match="another draw"):
        Parts(folder, range(10), lambda: {"seed": 0})
    for path in folder.glob("*.npy"):
        path.unlink()
    with Parts(folder, range(10), lambda: {"seed": 0}) as parts:  # the disk was full before the first part
        assert parts.gaps() == [range(10)]


def test_a_draw_that_fails_before_its_first_part_leaves_nothing(tmp_path):
    def fail():
        yield range(3), np.arange(3.0)
        raise KeyboardInterrupt

    with Parts(tmp_path / "parts", range(10), lambda: {"seed": 0}) as parts, pytest.raises(KeyboardInterrupt):
        parts.add(fail())
    assert not list(tmp_path.iterdir())


@needs_mounts
def test_a_full_disk_says_how_to_go_on(quick_bundle, run, run_forked, tmp_path):
    script = """
        mount -t tmpfs -o size=6m tmpfs disk
        "$@"; ls -A disk
        mount -o remount,size=100m disk
        "$@" && ls -A disk && cp disk/points.npy .
    """
    (tmp_path / "cwd" / "disk").mkdir(parents=True)
    argv = (quick_bundle, "--num_samples", MANY, "--output")
    words = ("unshare", "-rm", "sh", "-c", script, "sh", SCRIPTS / "ddpm-sample", *argv, "disk/points.npy")
    result = run(*words)
    assert result.stdout.split("disk/points.npy: ")[0] == "points.npy.parts\n", result.stderr
    assert result.stdout.endswith(" points\npoints.npy\n")
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in error
    assert f"of {MANY:,} samples are in disk/points.npy.parts: the same command goes on from there" in error
    assert run_forked("sample", *argv, tmp_path / "plain.npy").returncode == 0
    assert (tmp_path / "cwd" / "points.npy").read_bytes() == (tmp_path / "plain.npy").read_bytes()


@pytest.mark.slow
def test_rays_workers_draw_the_same(quick_bundle, run_forked, tmp_path):
    """Also if one of them is killed on the way."""
    argv = (quick_bundle, "--samples", f"7:{4 * MANY}", "--output")
    with start(*argv, tmp_path / "ray.npy", "--engine", "ray") as process:
        wait_for_part(tmp_path / "ray.npy.parts", process)
        worker = None
        while worker is None:
            assert process.poll() is None, process.stderr.read()
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker = child if child.cmdline()[:1] == ["ray::_Worker.draw"] else worker
        worker.kill()
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert run_forked("sample", *argv, tmp_path / "plain.npy").returncode == 0
    assert (tmp_path / "ray.npy").read_bytes() == (tmp_path / "plain.npy").read_bytes()
    assert_one_line_error(
        run_forked("sample", *argv, tmp_path / "a.npy", "--engine", "ray", "--address", "127.0.0.1:1"),
        "there is no Ray cluster at 127.0.0.1:1",
    )


@pytest.mark.slow
def test_rays_workers_are_judged_as_one_process(moons_bundle, run, run_forked, tmp_path):
    argv = (moons_bundle, "--dataset", "two_moons", "--class_labels", "--num_samples", 600, "--repeats", 2)
    with_ray = run("ddpm-evaluate", *argv, "--engine", "ray")
    assert with_ray.returncode == 0, with_ray.stderr
    assert with_ray.stdout == run_forked("evaluate", *argv).stdout
    np.save(tmp_path / "drawn.npy", np.zeros((9, 2)))
    drawn = run_forked("evaluate", tmp_path / "drawn.npy", "--dataset", "two_moons", "--engine", "ray")
    assert_one_line_error(drawn, "an engine draws from a checkpoint or a bundle")


def test_rows_of_a_ray_data_set(labelled_points, labelled_images):
    """The numbers of a batch need not follow one another. Its other columns are what is known and asked for."""
    numbers = np.array([5, 6, 7, 2, 3, 20])
    known = np.array([1.0, np.nan, 2.0, np.nan, 3.0, 4.0])
    batch = {"id": numbers, "x": known, "c": np.full(6, 9.0), "d": np.zeros(6), "kind": np.array(["a", "3"] * 3)}
    found = DrawBatch(labelled_points, seed=4, label="kind", guidance_scale=1.5)(batch)
    sampler = OnnxSampler(labelled_points)
    for row, number in enumerate(numbers.tolist()):
        asked = {"class_labels": batch["kind"][row].item(), "condition": {"c": 9.0, "d": 0.0}, "guidance_scale": 1.5}
        asked["known"] = [known[row], np.nan]
        (expected,) = sampler.sample(range(number, number + 1), 4, **asked)
        np.testing.assert_allclose([found["x"][row], found["y"][row]], expected, atol=1e-5)
    assert found["kind"] is batch["kind"]
    images = DrawBatch(labelled_images, number="n")({"n": numbers[:2]})["image"]
    np.testing.assert_allclose(images, OnnxSampler(labelled_images).sample(range(5, 7)), atol=1e-5)


def test_devices_and_providers(run_forked, labelled_points, tmp_path):
    argv = ("sample", labelled_points, "--output", tmp_path / "a.npy")
    assert run_forked(*argv, "--provider", "CPUExecutionProvider").returncode == 0
    argv += ("--overwrite",)
    assert_one_line_error(run_forked(*argv, "--provider", "abacus"), "no provider 'abacus', only", "cpu")
    assert_one_line_error(run_forked(*argv, "--device", "cpu"), "give a bundle's --provider")
    argv = ("sample", pretrained("heart"), "--output", tmp_path / "a.npy", "--overwrite")
    assert run_forked(*argv, "--device", "cpu").returncode == 0
    for device in ("abacus", "xpu:7"):
        assert_one_line_error(run_forked(*argv, "--device", device), f"there is no device '{device}'")
    assert_one_line_error(run_forked(*argv, "--provider", "cpu"), "give a checkpoint's --device")
    for patient in (pretrained("heart"), "heart"):
        examined = run_forked("doctor", patient, "--dataset", "heart", "--num_samples", 200, "--device", "abacus")
        assert_one_line_error(examined, "there is no device 'abacus'")
    options = ("--engine", "ray", "--device", "cpu")
    assert_one_line_error(run_forked(*argv, *options), "not for Ray's workers")
