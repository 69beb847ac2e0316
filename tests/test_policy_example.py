"""The policy example: the obstacle's geometry and its experts."""

import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from helpers import ROOT, random_weights
from PIL import Image

from ddpm_mlp_pipeline import DDPMMLPPipeline, MLPModel, export_bundle

pytest.importorskip("gymnasium", reason="needs gymnasium: pip install 'ddpm-mlp-pipeline[policy]'")
sys.path.insert(0, str(ROOT / "examples" / "policy"))

from demonstrations import demonstrate
from tasks import TASKS, ReachAround, walk_around


@pytest.mark.parametrize("side", [-1, 1])
def test_the_expert_passes_on_the_side_asked_for(side):
    env = ReachAround()
    for seed in range(10):
        position, _ = env.reset(seed=seed)
        done, beside = False, []
        while not done:
            position, _, terminated, truncated, info = env.step(walk_around(position, side))
            done = terminated or truncated
            if abs(position[1]) < 0.1:
                beside.append(position[0])
        assert info == {"passed": True, "hit": False}
        assert (side * np.array(beside) > ReachAround.RADIUS).all()


def test_the_straight_line_hits_the_disc():
    env = ReachAround()
    env.reset(seed=0)
    for _ in range(30):
        position, reward, terminated, _, info = env.step(np.array([0.0, 1.0]))  # longer than a step may be
        if terminated:
            break
    assert info == {"passed": False, "hit": True}
    assert reward == 0
    assert np.hypot(*position) < ReachAround.RADIUS
    assert position[1] > -1 + 0.05 * 11


def test_demonstrations_take_both_sides_from_the_same_place():
    """So near the start, the mean of the actions leads into the disc."""
    observations, actions = demonstrate(TASKS["reach"], episodes=20)
    assert actions.shape == (len(observations), TASKS["reach"].chunk * 2)
    x, y = observations.T
    at_the_turn = (y > -0.6) & (y < -0.54)
    sideways = actions.reshape(len(actions), -1, 2)[at_the_turn, :, 0].sum(axis=1)
    assert (np.abs(x[at_the_turn]) < 0.1).all()
    assert 0.2 < (sideways > 0).mean() < 0.8
    assert (np.abs(sideways) > 0.1).all()


def test_an_episode_runs_from_a_bundle_and_is_filmed(run, tmp_path):
    """The network is untrained, so that its steps have an exact length: the film has a frame for every other one."""
    task = TASKS["reach"]
    torch.manual_seed(0)
    pipe = DDPMMLPPipeline(
        random_weights(MLPModel(2 * task.chunk, hidden_dim=8, num_hidden_layers=1, condition_dim=2)),
        DDPMScheduler(),
        data_columns=[f"a{i}" for i in range(2 * task.chunk)],
        data_mean=[0.0, 0.01] * task.chunk,  # slowly up, into the disc
        data_std=[1e-4] * 2 * task.chunk,
        condition_columns=["o0", "o1"],
        condition_mean=[0.0, 0.0],
        condition_std=[1.0, 1.0],
    )
    pipe.save_pretrained(tmp_path / "policy")
    export_bundle(tmp_path / "policy", tmp_path / "bundle", num_inference_steps=4)
    film = tmp_path / "reach.gif"
    script = ROOT / "examples" / "policy" / "run.py"
    asked = ("--episodes", 1, "--rate", 1000, "--deadline_ms", 1000, "--film", film)
    result = run(sys.executable, script, "reach", tmp_path / "bundle", *asked)
    assert result.returncode == 0, result.stderr
    assert "0 of 1 passed" in result.stdout
    assert "100.00% of 10 decisions kept the deadline" in result.stdout  # 60 steps of 0.01, 6 from each decision
    assert "of 60 actions were late" in result.stdout or "of 61 actions were late" in result.stdout
    with Image.open(film) as frames:
        assert frames.n_frames in (30, 31)
        frames.seek(frames.n_frames - 1)
        assert frames.size == (240, 240)
        colours = frames.convert("RGB").getcolors(2**16)
    assert len(colours) > 3  # the background, the disc, the goal and the path
