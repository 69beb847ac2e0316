"""The golden vectors and FORMAT.md agree with the runtime and with diffusers."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from helpers import ROOT

from ddpm_mlp_pipeline import OnnxSampler, StepTable, compile_scheduler, pretrained
from ddpm_mlp_pipeline.export.compile import make_scheduler
from ddpm_mlp_pipeline.runtime.columns import TableCodec
from ddpm_mlp_pipeline.runtime.noise import normal, philox
from export.golden import CELLS, RUNS, read, record

FORMAT = (ROOT / "export" / "FORMAT.md").read_text(encoding="utf-8")
SCHEDULERS = {
    name: (run.scheduler, run.num_inference_steps) for name, run in RUNS.items() if run.checkpoint == "heart"
}


def assert_agree(found, expected, tolerance=1e-4, place="the run"):
    """Assert equal names, strings and lengths, and numbers that differ by at most the tolerance."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for name, value in expected.items():
            assert_agree(found[name], value, tolerance, f"{place}'s {name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_agree(a, b, tolerance, f"{place}[{i}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=tolerance), place
    else:
        assert found == expected, place


def of_version(golden, version):
    """Leave out what the first version lacks. Its files hold bundles of version 1."""
    if version > 1:
        return golden
    own = {name: value for name, value in golden.items() if name not in ("asked", "inputs")}
    return own | {"version": 1, "bundle": golden["bundle"] | {"version": 1}}


def test_the_runtime_agrees_with_the_golden_vectors(golden_run, golden_bundle, request):
    run = RUNS[request.node.callspec.params["golden_run"]]
    assert golden_run["seed"] == str(run.seed)
    assert_agree(of_version(record(golden_bundle, run), golden_run["version"]), golden_run)


def test_the_golden_tables_are_of_every_kind():
    runs = dict(read())
    assert runs.keys() == RUNS.keys()
    of_heart = {name: run for name, run in runs.items() if name in SCHEDULERS}
    histories = {
        name: max(len(step["to_next"]) for step in run["step_table"]["steps"]) for name, run in of_heart.items()
    }
    assert histories == {"ddim_10": 1, "ddpm_10": 1, "dpmsolver_multistep_10": 2, "heun_6": 2}
    assert {name for name, run in of_heart.items() if "z" in run["calls"][0]} == {"ddpm_10"}
    assert {name for name, run in of_heart.items() if "x_0" not in run["calls"][0]} == {"dpmsolver_multistep_10"}
    assert max(int(run["seed"]) for run in runs.values()) == 2**63 - 1
    heun = runs["heun_6"]
    largest = max(np.abs(call["x_0"]).max() for call in heun["calls"])
    assert largest == pytest.approx(heun["step_table"]["clip_range"])  # otherwise a port that never clips would pass


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_schedulers_compile_to_takes_the_golden_steps(name, heart):
    """The coefficients of a table that looks back are one choice of several: the steps are what must agree."""
    scheduler, steps = SCHEDULERS[name]
    table = compile_scheduler(make_scheduler(scheduler, heart.scheduler), steps)
    run = dict(read())[name]
    calls = [
        [np.array(call.get(term, np.zeros((3, 2)))) for term in ("x", "eps", "x_0", "z")] for call in run["calls"]
    ]
    assert table.timesteps.tolist() == [call["timestep"] for call in run["calls"]]
    for k, expected in enumerate([*[call[0] for call in calls[1:]], np.array(run["sample"])]):
        x, eps, x_0, _ = calls[k]
        if table.clip_range is not None:
            a, b = table.to_x_0[k]
            np.testing.assert_allclose(np.clip(a * x + b * eps, -table.clip_range, table.clip_range), x_0, atol=1e-4)
        terms = zip(table.to_next[k].reshape(-1, 4), reversed(calls[: k + 1]), strict=False)
        found = sum(c * term for row, past in terms for c, term in zip(row, past, strict=True))
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_stock_scheduler_takes_the_same_steps(name, heart, monkeypatch):
    """With the file's network outputs and noise, diffusers' scheduler gives the file's x at each call."""
    run = dict(read())[name]
    scheduler = make_scheduler(SCHEDULERS[name][0], heart.scheduler)
    scheduler.set_timesteps(SCHEDULERS[name][1])
    noises = iter([torch.tensor(call["z"]) for call in run["calls"] if "z" in call])
    module = sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(noises), raising=False)
    sample = torch.tensor(run["calls"][0]["x"]) * scheduler.init_noise_sigma
    for call, t in zip(run["calls"], scheduler.timesteps, strict=True):
        assert call["timestep"] == pytest.approx(float(t))
        x = scheduler.scale_model_input(sample, t)
        np.testing.assert_allclose(x, call["x"], atol=1e-4)
        sample = scheduler.step(torch.tensor(call["eps"]), t, sample).prev_sample
    np.testing.assert_allclose(sample, run["sample"], atol=1e-4)
    np.testing.assert_allclose(heart.to_data_units(sample), run["data"], atol=1e-4)


def test_the_stock_scheduler_takes_the_steps_of_a_learned_variance(monkeypatch):
    run = dict(read())["learned_variance"]
    scheduler = DDPMScheduler.from_pretrained(pretrained(run["checkpoint"]), subfolder="scheduler")
    scheduler.set_timesteps(10)
    draws = normal(int(run["seed"]), range(3), 2, range(1, 11))
    noises = iter(torch.tensor(draws))
    monkeypatch.setattr(sys.modules[DDPMScheduler.__module__], "randn_tensor", lambda *args, **kwargs: next(noises))
    sample = torch.tensor(run["calls"][0]["x"])
    for call, t in zip(run["calls"], scheduler.timesteps, strict=True):
        np.testing.assert_allclose(sample, call["x"], atol=1e-4)
        sample = scheduler.step(torch.tensor(call["output"]), t, sample).prev_sample
    np.testing.assert_allclose(sample, run["sample"], atol=1e-4)


def test_the_guided_run_is_that_of_the_paper():
    run = dict(read())["guided"]
    w, (t_high, t_low) = run["asked"]["guidance_scale"], run["asked"]["guidance_interval"]
    is_guided = [t_low <= call["timestep"] <= t_high for call in run["calls"]]
    assert is_guided == ["output" in call for call in run["calls"]] == [False, True, True, True, False, False]
    for call in run["calls"]:
        if "output" in call:
            conditional, null = np.split(np.array(call["output"]), 2)
            assert np.abs(conditional - null).max() > 0.1
            np.testing.assert_allclose(call["eps"], null + w * (conditional - null), atol=1e-5)
    np.testing.assert_allclose(run["inputs"]["condition"], [[1.0], [-0.75], [0.0]])  # (c − 10) / 2


def test_the_known_values_are_in_the_run():
    run = dict(read())["known_values"]
    alphas_cumprod = [step["alpha_cumprod"] for step in run["step_table"]["steps"] for _ in range(2)]  # resample
    assert len(run["calls"]) == len(alphas_cumprod) == 8
    known = np.array(run["asked"]["known"], dtype=float)
    y = (known - [1.0, -2.0]) / [2.0, 0.5]
    is_known = ~np.isnan(y)
    for call, after, alpha_cumprod in zip(run["calls"], run["calls"][1:], alphas_cumprod[1:], strict=False):
        noisy = alpha_cumprod**0.5 * y + (1 - alpha_cumprod) ** 0.5 * np.array(call["z_known"])
        np.testing.assert_allclose(np.array(after["x"])[is_known], noisy[is_known], atol=1e-5)
    assert "z_known" not in run["calls"][-1]
    np.testing.assert_allclose(np.array(run["data"])[is_known], known[is_known], atol=1e-5)
    assert set(run["inputs"]["class_labels"]) == {3}
    assert run["inputs"]["condition"] == [[None]] * 3


def test_the_cells_are_in_the_run():
    run = dict(read())["table"]
    codec = TableCodec(run["bundle"]["columns"])
    assert run["cells"] == list(codec.format(codec.decode(run["data"])))
    kinds = [column["kind"] for column in codec.columns]
    assert set(kinds) == {"number", "integer", "date", "category", "boolean"}
    assert [name for name, cells in zip(codec.names, zip(*run["cells"], strict=True), strict=True) if "" in cells] == [
        column["name"] for column in codec.columns if column["has_missing"]
    ]
    for name, cells in CELLS.items():
        for row, cell in zip(run["cells"], cells, strict=True):
            assert row[codec.names.index(name)] == cell or not cell
    # Samples of a correct port differ by up to 1e-4, and have these cells, too.
    for noise in np.random.default_rng(0).uniform(-5e-4, 5e-4, (50, 3, codec.width)):
        assert list(codec.format(codec.decode(run["data"] + noise))) == run["cells"]


def program() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", FORMAT, re.DOTALL)
    return code


@pytest.mark.parametrize("golden_run", [name for name, run in RUNS.items() if not run.asked], indirect=True)
def test_the_formats_program_draws_the_golden_samples(run, golden_run, golden_bundle):
    result = run(sys.executable, "-c", program(), golden_bundle, golden_run["num_samples"], golden_run["seed"])
    assert result.returncode == 0, result.stderr
    np.testing.assert_allclose(json.loads(result.stdout), golden_run["data"], atol=1e-5)
    assert len([line for line in program().splitlines() if line]) <= 40


def test_the_formats_program_takes_labels_and_guidance(run, labelled_points, labelled_images, labelled_learned):
    labels = [2, 0, 3, 1]
    for bundle in (labelled_points, labelled_images, labelled_learned):
        result = run(sys.executable, "-c", program(), bundle, 4, 5, labels, 2.5)
        assert result.returncode == 0, result.stderr
        expected = OnnxSampler(bundle).sample(4, 5, class_labels=labels, guidance_scale=2.5)
        samples = np.array(json.loads(result.stdout))
        samples = samples if samples.ndim == 2 else np.moveaxis(samples, 1, -1)  # it prints [channels, height, width]
        np.testing.assert_allclose(samples, expected, atol=1e-4)
    result = run(sys.executable, "-c", program(), labelled_points, 4, 5)
    np.testing.assert_allclose(json.loads(result.stdout), OnnxSampler(labelled_points).sample(4, 5), atol=1e-4)


def test_the_formats_worked_example():
    run = dict(read())["ddpm_10"]
    seed = int(run["seed"])
    words = philox(tuple(np.zeros((4, 1), dtype=np.uint64)), (seed % 2**32, seed // 2**32))
    example = FORMAT[FORMAT.index("## A worked example") :].replace("−", "-")
    assert str(seed) in example
    assert " ".join(f"{int(word[0]):08x}" for word in words) in example
    first, step = run["calls"][0], run["step_table"]["steps"][0]
    numbers = (*first["x"][0], *first["eps"][0], *first["z"][0], *step["to_x_0"], *run["calls"][1]["x"][0])
    for number in (*numbers, *run["data"][0]):
        assert f"{number:.6f}" in " ".join(example.split())


@pytest.mark.slow
def test_the_command_writes_the_shipped_files(run, tmp_path):
    result = run(sys.executable, "-m", "export.golden", tmp_path / "golden", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'golden'}: 9 runs of 3 samples\n"
    for name, expected in read():
        found = json.loads((tmp_path / "golden" / f"{name}.json").read_text())
        if expected["version"] == 1:  # its table is of the version before; another test compares its steps
            found["step_table"] = expected["step_table"]
        found, expected = of_version(found, expected["version"]), dict(expected)
        # CPUs differ by their rounding in the network's units, of which the data's are a multiple.
        std = max(expected["bundle"].get("data_std") or [1.0])
        assert_agree(found.pop("data"), expected.pop("data"), 1e-4 * max(1.0, std), f"{name}'s data")
        assert_agree(found, expected)


def test_a_golden_bundle_is_a_bundle(golden_run, golden_bundle):
    sampler = OnnxSampler(golden_bundle)
    assert repr(sampler.table) == repr(StepTable.load(golden_bundle / "step_table.json"))
    asked = golden_run.get("asked", {})
    if "known" in asked:
        asked = asked | {"known": np.array(asked["known"], dtype=float)}  # null is NaN
    samples = sampler.sample(golden_run["num_samples"], int(golden_run["seed"]), **asked)
    np.testing.assert_allclose(samples, golden_run["data"], atol=1e-4)
