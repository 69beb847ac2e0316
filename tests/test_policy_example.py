"""The policy example: the obstacle's geometry and its experts."""

import sys

import numpy as np
import pytest
from helpers import ROOT

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
