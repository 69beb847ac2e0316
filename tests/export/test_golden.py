"""The golden vectors and FORMAT.md agree with the runtime and with diffusers."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_one_line_error

from ddpm_mlp_pipeline import OnnxSampler, StepTable, compile_scheduler
from ddpm_mlp_pipeline.export.compile import make_scheduler
from ddpm_mlp_pipeline.runtime.noise import philox
from export.golden import RUNS, read, record

FORMAT = (ROOT / "export" / "FORMAT.md").read_text(encoding="utf-8")
SCHEDULERS = {f"{scheduler}_{steps}": (scheduler, steps) for scheduler, steps, _ in RUNS}


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


def test_the_runtime_agrees_with_the_golden_vectors(golden_run, golden_bundle):
    assert_agree(record(golden_bundle, int(golden_run["seed"])), golden_run)


def test_the_golden_tables_are_of_every_kind():
    runs = dict(read())
    assert runs.keys() == SCHEDULERS.keys()
    histories = {name: max(len(step["to_next"]) for step in run["step_table"]["steps"]) for name, run in runs.items()}
    assert histories == {"ddim_10": 1, "ddpm_10": 1, "dpmsolver_multistep_10": 2, "heun_6": 2}
    assert {name for name, run in runs.items() if "z" in run["calls"][0]} == {"ddpm_10"}
    assert {name for name, run in runs.items() if "x_0" not in run["calls"][0]} == {"dpmsolver_multistep_10"}
    assert max(int(run["seed"]) for run in runs.values()) == 2**63 - 1
    heun = runs["heun_6"]
    largest = max(np.abs(call["x_0"]).max() for call in heun["calls"])
    assert largest == pytest.approx(heun["step_table"]["clip_range"])  # otherwise a port that never clips would pass


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_golden_tables_are_what_schedulers_compile_to(name, heart, tmp_path):
    scheduler, steps = SCHEDULERS[name]
    compile_scheduler(make_scheduler(scheduler, heart.scheduler), steps).save(tmp_path / "table.json")
    assert_agree(json.loads((tmp_path / "table.json").read_text()), dict(read())[name]["step_table"], 1e-5)


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


def program() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", FORMAT, re.DOTALL)
    return code


def test_the_formats_program_draws_the_golden_samples(run, golden_run, golden_bundle):
    result = run(sys.executable, "-c", program(), golden_bundle, golden_run["num_samples"], golden_run["seed"])
    assert result.returncode == 0, result.stderr
    np.testing.assert_allclose(json.loads(result.stdout), golden_run["data"], atol=1e-5)
    assert len([line for line in program().splitlines() if line]) <= 30


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


def test_the_command_writes_the_shipped_files(run, tmp_path):
    result = run(sys.executable, "-m", "export.golden", tmp_path / "golden", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'golden'}: 4 runs of 3 samples\n"
    for name, expected in read():
        assert_agree(json.loads((tmp_path / "golden" / f"{name}.json").read_text()), expected)
    again = (sys.executable, "-m", "export.golden", tmp_path / "golden")
    assert_one_line_error(run(*again, cwd=ROOT), "golden exists and isn't empty: pass --overwrite")
    (tmp_path / "golden" / "thesis.tex").touch()
    assert_one_line_error(run(*again, "--overwrite", cwd=ROOT), "thesis.tex", "left alone")


def test_a_golden_bundle_is_a_bundle(golden_run, golden_bundle):
    sampler = OnnxSampler(golden_bundle)
    assert repr(sampler.table) == repr(StepTable.load(golden_bundle / "step_table.json"))
    samples = sampler.sample(golden_run["num_samples"], int(golden_run["seed"]))
    np.testing.assert_allclose(samples, golden_run["data"], atol=1e-4)
