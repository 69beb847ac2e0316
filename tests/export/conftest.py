"""Fixtures for the tests of the page and the ports: golden vectors as bundles, Node, and ONNX Runtime's npm packages.

A test is skipped if the machine lacks a program, and the reason says how to install it. Packages are kept in pytest's
cache.
"""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from helpers import random_weights

from ddpm_mlp_pipeline import DDPMMLPPipeline, MLPModel, export_bundle, pretrained
from ddpm_mlp_pipeline.errors import ConfigurationError
from ddpm_mlp_pipeline.export import page
from export import golden

GOLDEN = dict(golden.read())


@pytest.fixture(params=GOLDEN)
def golden_run(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Each golden run, as recorded by `export.golden.record`."""
    return GOLDEN[request.param]


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    golden.tiny_pipeline().save_pretrained(folder / "checkpoint")
    export_bundle(folder / "checkpoint", folder / "bundle", "ddim", 6)
    return folder / "bundle"


@pytest.fixture(scope="session")
def table_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with a column of each kind, from an untrained network that takes known cells."""
    folder = tmp_path_factory.mktemp("table")
    golden.table_pipeline().save_pretrained(folder / "people")
    export_bundle(folder / "people", folder / "bundle", "ddpm", 4)
    return folder / "bundle"


NETWORKS = {"heart": "ddim_bundle", "swiss_roll_2015": "learned_bundle", "moons": "moons_bundle", None: "tiny_bundle"}


@pytest.fixture
def golden_bundle(golden_run: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The bundle of a golden run: its table and info, and the checkpoint's network."""
    folder = tmp_path / "golden-bundle"
    folder.mkdir()
    network = "table_bundle" if "columns" in golden_run["bundle"] else NETWORKS[golden_run["checkpoint"]]
    network = request.getfixturevalue(network) / "unet.onnx"
    shutil.copyfile(network, folder / "unet.onnx")
    (folder / "bundle.json").write_text(json.dumps(golden_run["bundle"]))
    (folder / "step_table.json").write_text(json.dumps(golden_run["step_table"]))
    return folder


def make_labelled(folder: Path, model: MLPModel, num_inference_steps: int = 6, **options: Any) -> Path:
    """Export an untrained network of three classes, with random weights, by DDPM."""
    torch.manual_seed(0)
    # The samples are then what the network says last, and few of them are clipped, which would hide differences.
    # Larger weights at the end would magnify those of rounding, from step to step.
    variance = "learned_range" if model.out_channels > model.config.in_channels else "fixed_small"
    scheduler = DDPMScheduler(
        1000, prediction_type="sample", variance_type=variance, clip_sample=True, clip_sample_range=3.0
    )
    is_points = model.config.sample_size is None
    stds = {"class_embedding": 1.0 if is_points else 0.3, "proj_out.weight": 0.07 if is_points else 0.1}
    for name, parameter in random_weights(model).named_parameters():
        for part, std in stds.items():
            if part in name:
                torch.nn.init.normal_(parameter, std=std)
    pipeline = DDPMMLPPipeline(model, scheduler, class_names=["a", "b b", "3"], **options)
    pipeline.save_pretrained(folder / "checkpoint")
    export_bundle(folder / "checkpoint", folder / "bundle", "ddpm", num_inference_steps)
    return folder / "bundle"


@pytest.fixture(scope="session")
def labelled_points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Points with labels and a condition of two numbers."""
    return make_labelled(
        tmp_path_factory.mktemp("labelled-points"),
        MLPModel(2, hidden_dim=32, num_class_embeds=3, condition_dim=2),
        data_mean=[1.0, -2.0],
        data_std=[2.0, 0.5],
        data_columns=["x", "y"],
        condition_columns=["c", "d"],
        condition_mean=[10.0, 0.0],
        condition_std=[2.0, 1.0],
    )


@pytest.fixture(scope="session")
def labelled_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in colour that are not square, with labels."""
    model = MLPModel(3, (6, 9), hidden_dim=32, num_class_embeds=3)
    return make_labelled(tmp_path_factory.mktemp("labelled-images"), model)


@pytest.fixture(scope="session")
def labelled_learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Points with labels, from a network that predicts the variance, too."""
    model = MLPModel(2, hidden_dim=32, num_class_embeds=3, out_channels=4)
    return make_labelled(tmp_path_factory.mktemp("labelled-learned"), model)


@pytest.fixture(scope="session")
def learned_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Points from a network that predicts the variance, too."""
    folder = tmp_path_factory.mktemp("learned") / "bundle"
    export_bundle(pretrained("swiss_roll_2015"), folder, "ddpm", 10)
    return folder


@pytest.fixture(scope="session")
def moons_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Points of two classes, whose shares are known."""
    folder = tmp_path_factory.mktemp("moons") / "bundle"
    export_bundle(pretrained("moons"), folder, "ddim", 6)
    return folder


@pytest.fixture(scope="session")
def node() -> str:
    return shutil.which("node") or pytest.skip("needs Node: apt-get install nodejs")


@pytest.fixture(scope="session")
def node_folder(node: str, pytestconfig: pytest.Config) -> Path:
    """A folder in which Node finds onnxruntime-node."""
    package = f"onnxruntime-node@{page.VERSION}"
    folder = pytestconfig.cache.mkdir("npm") / package
    if not folder.exists():
        npm = shutil.which("npm") or pytest.skip("needs npm: apt-get install npm")
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            prefix = Path(temporary) / "prefix"
            prefix.mkdir()
            argv = (npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", prefix, package)
            result = subprocess.run(argv, capture_output=True, text=True, timeout=300)
            if result.returncode != 0:
                pytest.skip(f"npm can't install {package}: {' '.join(result.stderr.split())[-300:]}")
            with contextlib.suppress(OSError):  # another test process has moved it there first
                prefix.rename(folder)
    return folder


@pytest.fixture(scope="session")
def onnxruntime_web(pytestconfig: pytest.Config) -> Path:
    """The unpacked onnxruntime-web, downloaded as `write_page` does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "XDG_CACHE_HOME", str(pytestconfig.cache.mkdir("npm")))
        try:
            return page._cached_package()
        except ConfigurationError as error:
            pytest.skip(str(error))


DRAW = """
    const { openBundle } = await import(process.argv[1]);
    import { createRequire } from "node:module";
    import { readFileSync } from "node:fs";
    import { join } from "node:path";
    const ort = createRequire(join(process.cwd(), "here"))("onnxruntime-node");
    const { bundle, asked, number, seed } = JSON.parse(readFileSync(0, "utf-8"), (_, v) => (v === "NaN" ? NaN : v));
    const sampler = await openBundle(ort, async (name) => readFileSync(join(bundle, name)));
    const results = [];
    for (const each of asked) {
      try {
        const samples = [];
        for await (const batch of sampler.batches(number, BigInt(seed), 3, each)) samples.push(...batch);
        results.push(samples);
      } catch (error) {
        results.push(`${error.constructor.name}: ${error.message}`);
      }
    }
    console.log(JSON.stringify(results));
"""


@pytest.fixture
def draw_in_node(run, node, node_folder):
    """Draw from a bundle what is asked, one after the other: the numbers, or an error's kind and message."""

    def draw_in_node(bundle, asked, number=5, seed=2**40 + 3):
        given = {"bundle": str(bundle), "asked": asked, "number": number, "seed": str(seed)}
        text = json.dumps(given).replace("NaN", '"NaN"')  # which JSON has no number for
        result = run(
            node,
            "--input-type=module",
            "-e",
            DRAW,
            (page.WEB / "ddpm.js").as_uri(),
            input=text,
            cwd=node_folder,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return draw_in_node
