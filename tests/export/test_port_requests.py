"""The JavaScript sampler in Node draws what Python draws, whatever is asked: labels, guidance, known values."""

import json
import shutil

import numpy as np
import onnx
import pytest
from helpers import ROOT, assert_one_line_error

from ddpm_mlp_pipeline import OnnxSampler
from ddpm_mlp_pipeline.errors import ConfigurationError
from ddpm_mlp_pipeline.export.sampler_graph import build_sampler
from ddpm_mlp_pipeline.runtime.noise import draw_labels

N = 5
PYTHON_NAMES = {
    "classLabels": "class_labels",
    "guidanceScale": "guidance_scale",
    "guidanceInterval": "guidance_interval",
}


def python_names(asked):
    return {PYTHON_NAMES.get(name, name): value for name, value in asked.items()}


def assert_the_same(draw_in_node, bundle, asked):
    sampler, seed = OnnxSampler(bundle), 2**40 + 3
    unlike = sampler.sample(N, seed)
    for each, found in zip(asked, draw_in_node(bundle, asked), strict=True):
        assert not isinstance(found, str), (each, found)
        expected = sampler.sample(N, seed, **python_names(each))
        if each:
            assert np.abs(expected - unlike).max() > 1e-3, each  # it makes a difference
        np.testing.assert_allclose(np.reshape(found, expected.shape), expected, atol=1e-4, err_msg=str(each))


NAN = float("nan")
LABELS = ["b b", 0, 3, "3", 1]  # 3 is the null label
CONDITIONS = [[10.0 + i, i / 2] for i in range(N)]
ROWS = [[1.5, NAN], [NAN, -2.0], [NAN, NAN], [0.5, -2.5], [3.0, NAN]]


def test_labels_conditions_and_guidance(draw_in_node, labelled_points):
    asked = [
        {},
        {"classLabels": "b b"},
        {"classLabels": LABELS},
        {"condition": {"d": 1.5, "c": 7}},
        {"classLabels": LABELS, "condition": CONDITIONS},
        {"classLabels": 2, "guidanceScale": 3.5},
        {"classLabels": LABELS, "condition": CONDITIONS, "guidanceScale": 0.25},
        {"classLabels": 2, "condition": [12, 1], "guidanceScale": 4, "guidanceInterval": [700, 200]},
    ]
    assert_the_same(draw_in_node, labelled_points, asked)


def test_drawn_labels(draw_in_node, moons_bundle):
    asked = [{}, {"classLabels": 2}, {"guidanceScale": 2}, {"known": {"x": 0.5}}]  # 2 is the null label
    assert_the_same(draw_in_node, moons_bundle, asked)


def test_known_values(draw_in_node, labelled_points, labelled_images):
    asked = [
        {"known": {"x": 1.5}},
        {"known": ROWS, "classLabels": LABELS, "condition": CONDITIONS, "guidanceScale": 2},
        {"known": {"y": -2}, "resample": 3, "classLabels": 1},
        {"known": [2, -2], "mask": [[i % 2, i % 3] for i in range(N)], "resample": 2, "guidanceScale": 1.5},
    ]
    assert_the_same(draw_in_node, labelled_points, asked)
    rng = np.random.default_rng(0)
    one, each = rng.uniform(size=(6, 9, 3)), rng.uniform(size=(N, 6, 9, 3))
    half, masks = np.arange(54).reshape(6, 9) < 27, rng.uniform(size=(N, 6, 9)) < 0.5
    asked = [
        {"known": one.tolist(), "mask": half.tolist()},
        {"known": each.tolist(), "mask": half.tolist(), "classLabels": LABELS, "guidanceScale": 2, "resample": 2},
        {"known": one.tolist(), "mask": masks.tolist(), "classLabels": "a"},
        {"classLabels": "a", "guidanceScale": 3},
    ]
    assert_the_same(draw_in_node, labelled_images, asked)


def test_a_learned_variance(draw_in_node, learned_bundle, labelled_learned):
    assert_the_same(draw_in_node, learned_bundle, [{}, {"known": ROWS}])
    assert_the_same(draw_in_node, labelled_learned, [{"classLabels": LABELS}, {"classLabels": 2, "guidanceScale": 3}])


def test_what_cannot_be_drawn_is_told_as_in_python(draw_in_node, labelled_points, labelled_images, learned_bundle):
    image = np.zeros((6, 9, 3)).tolist()
    for bundle, asked in {
        labelled_points: [
            {"classLabels": "c"},
            {"classLabels": 4},
            {"classLabels": -1},
            {"classLabels": [0, 1]},
            {"condition": {"c": 1}},
            {"condition": {"c": 1, "e": 2}},
            {"condition": [1, 2, 3]},
            {"condition": [NAN, 1]},
            {"guidanceScale": NAN},
            {"guidanceInterval": [500, 100]},
            {"guidanceScale": 2, "guidanceInterval": [100, 500]},
            {"guidanceScale": 2, "guidanceInterval": [500]},
            {"resample": 0},
            {"resample": 1.5},
            {"known": {"z": 1}},
            {"mask": [1, 0]},
            {"known": [1, NAN], "mask": [1, 1]},
        ],
        labelled_images: [{"condition": [1]}, {"known": image}],
        learned_bundle: [{"classLabels": 0}, {"guidanceScale": 2}, {"resample": 2}],
    }.items():
        sampler = OnnxSampler(bundle)
        for each, found in zip(asked, draw_in_node(bundle, asked), strict=True):
            with pytest.raises(Exception) as error:  # noqa: PT011 (whichever Python raises)
                sampler.sample(N, **python_names(each))
            kind, _, message = found.partition(": ")
            assert kind == ("RangeError" if error.type is ConfigurationError else "BundleError")
            assert message.lower() == str(error.value).lower()
    for asked, fragment in [
        ({"known": [1, 2, 3]}, "known must hold 2 numbers, or that for each of 5 samples, got 3"),
        ({"known": [1, 2], "mask": [1]}, "the mask must hold 2 numbers"),
        ({"known": ["x", 2]}, "known must hold numbers"),
        ({"class_labels": 1}, "one can't ask for class_labels"),
    ]:
        assert fragment in draw_in_node(labelled_points, [asked])[0]


# The commands


def test_sample_mjs_draws_what_is_asked(run, node, node_folder, labelled_points, learned_bundle, labelled_images):
    sampler = OnnxSampler(labelled_points)
    argv = (node, ROOT / "export" / "ports" / "sample.mjs")
    result = run(
        *(*argv, labelled_points, "--num_samples", 4, "--seed", 9, "--class_labels", "b b", "--class_labels", 2),
        *("--guidance_scale", 2.5, "--condition", "c=12", "--condition", "d=-1", "--known", "x=1.25"),
        *("--resample", 2, "--batch_size", 3),
        cwd=node_folder,
    )
    assert result.returncode == 0, result.stderr
    points = np.loadtxt(result.stdout.splitlines(), delimiter=",", skiprows=1)
    asked = {"condition": [12, -1], "guidance_scale": 2.5, "known": {"x": 1.25}, "resample": 2}
    expected = sampler.sample(8, 9, class_labels=[1] * 4 + [2] * 4, **asked)
    np.testing.assert_allclose(points, expected, atol=1e-4)
    np.testing.assert_allclose(points[:, 0], 1.25, atol=1e-6)
    for bundle, *options, fragment in [
        (labelled_points, "--class_labels", "zebra", "there is no class 'zebra', only a, b b, 3"),
        (labelled_points, "--condition", "12", '--condition takes NAME=VALUE, not "12"'),
        (labelled_points, "--known", "x=wide", 'x must be a finite number, not "wide"'),
        (labelled_points, "--guidance_scale", "much", '--guidance_scale must be a finite number, not "much"'),
        (labelled_points, "--resample", "0", "resample must be a whole number of at least 1, got 0"),
        (labelled_images, "--known", "x=1", "known images need a mask"),
        (learned_bundle, "--class_labels", "1", "this network knows no classes"),
        (learned_bundle, "--resample", "2", "can't be resampled"),
    ]:
        assert_one_line_error(run(*argv, bundle, *options, cwd=node_folder), fragment)


def test_sampler_mjs_takes_a_label_and_guidance(run, node, node_folder, labelled_points, tmp_path):
    onnx.save(build_sampler(labelled_points, takes_known=True), tmp_path / "sampler.onnx")
    argv = (node, ROOT / "export" / "ports" / "sampler.mjs", tmp_path / "sampler.onnx", 20, 2**62, 2, 3.0)
    result = run(*argv, cwd=node_folder)
    assert result.returncode == 0, result.stderr
    expected = OnnxSampler(labelled_points).sample(20, 2**62, class_labels=2, guidance_scale=3.0)
    np.testing.assert_allclose(np.reshape(json.loads(result.stdout)["data"], (20, 2)), expected, atol=1e-4)


def test_sampler_mjs_takes_a_label_for_each_sample(run, node, node_folder, moons_bundle, tmp_path):
    onnx.save(build_sampler(moons_bundle), tmp_path / "sampler.onnx")
    argv = (node, ROOT / "export" / "ports" / "sampler.mjs", tmp_path / "sampler.onnx", 20, 7)
    labels = draw_labels(7, range(20), [0.4996, 0.5004]).tolist()  # as FORMAT.md says
    result = run(*argv, labels, cwd=node_folder)
    assert result.returncode == 0, result.stderr
    samples = np.reshape(json.loads(result.stdout)["data"], (20, 2))
    np.testing.assert_allclose(samples, OnnxSampler(moons_bundle).sample(20, 7), atol=1e-4)
    assert "LABELS" in run(*argv, cwd=node_folder).stderr


def test_bundles_of_the_versions_before_open(draw_in_node, ddim_bundle, tmp_path):
    folder = shutil.copytree(ddim_bundle, tmp_path / "old")
    info = json.loads((folder / "bundle.json").read_text())
    table = json.loads((folder / "step_table.json").read_text())
    for step in table["steps"]:
        step.pop("alpha_cumprod")
    del info["inputs"], info["sha256"]
    (folder / "bundle.json").write_text(json.dumps(info | {"version": 1}))
    (folder / "step_table.json").write_text(json.dumps(table | {"version": 2}))
    samples, message = draw_in_node(folder, [{}, {"known": [0.1, NAN]}])
    np.testing.assert_allclose(np.reshape(samples, (N, 2)), OnnxSampler(folder).sample(N, 2**40 + 3), atol=1e-4)
    assert message == "RangeError: this bundle's step table takes no known values: export the checkpoint again"
