"""The two tasks, with their scripted experts. Needs numpy and gymnasium only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


class ReachAround(gymnasium.Env[Vector, Vector]):
    """Walk from below a disc to a goal above it, without touching the disc.

    The observation is the position, the action a step of at most `SPEED`. An episode ends at the goal, where `info`
    says `passed`, or in the disc.
    """

    RADIUS, GOAL, GOAL_RADIUS, SPEED, MAX_STEPS = 0.4, (0.0, 1.0), 0.1, 0.1, 100

    observation_space = gymnasium.spaces.Box(-2, 2, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float64)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Vector, dict[str, Any]]:
        super().reset(seed=seed)
        self.position = np.array([self.np_random.normal(0, 0.02), -1.0])
        self.steps = 0
        return self.position.copy(), {}

    def step(self, action: Vector) -> tuple[Vector, float, bool, bool, dict[str, Any]]:
        length = float(np.hypot(*action))
        self.position = self.position + action * min(1.0, self.SPEED / max(length, 1e-9))
        self.steps += 1
        hit = bool(np.hypot(*self.position) < self.RADIUS)
        passed = bool(np.hypot(*(self.position - self.GOAL)) < self.GOAL_RADIUS)
        info = {"passed": passed, "hit": hit}
        return self.position.copy(), float(passed), hit or passed, self.steps >= self.MAX_STEPS, info


TURN, DETOUR = -0.53, 0.55  # where the expert leaves the straight line, and how far it goes to the side


def walk_around(position: Vector, side: int) -> Vector:
    """Return the expert's step: straight on until the disc is near, then to one side, past the disc, and to the goal.

    Args:
        position: x and y.
        side: −1 for left, 1 for right.
    """
    x, y = position
    aside = side * DETOUR - x
    if y < TURN:
        return np.array([0.0, 0.05])
    if y < 0.1:
        return np.array([np.clip(aside, -0.08, 0.08), 0.03 if abs(aside) > 0.08 else 0.05])
    to_goal = np.array(ReachAround.GOAL) - position
    return 0.05 * to_goal / np.hypot(*to_goal)


def swing_up(observation: Vector) -> Vector:
    """Return the expert's torque for Gymnasium's Pendulum: pump energy, then balance.

    Below, the torque follows the angular velocity until the energy is that of the upright pendulum (Åström & Furuta
    2000, "Swinging up a pendulum by energy control"); near the top, it is linear in angle and angular velocity.

    Args:
        observation: cos θ, sin θ and θ′, with θ = 0 upright.
    """
    cos, sin, velocity = observation
    angle = np.arctan2(sin, cos)
    energy = velocity**2 / 6 + 5 * (cos - 1)  # ½ m l²/3 θ′² + ½ m g l (cos θ − 1), 0 at rest at the top
    if abs(angle) < 0.6 and abs(velocity) < 4:
        torque = -12 * angle - 3 * velocity
    else:
        torque = -2 * energy * (np.sign(velocity) or 1.0)
    return np.array([np.clip(torque, -2, 2)])


@dataclass(frozen=True)
class Task:
    """A task, its expert, and how its actions are divided into chunks.

    Attributes:
        make: make the environment, with a render mode or `None`.
        expert: the expert's action for an observation and a side, −1 or 1, which only `reach` uses.
        chunk: number of actions that the policy draws at once.
        executed: number of these that are taken before the next decision.
        disturbance: standard deviation of what is added to the demonstrations' actions, but not to their record, so
            that they also show how to correct a deviation (Laskey et al. 2017, "DART").
        starts: further options of `reset` for every other demonstration.
    """

    make: Callable[[str | None], gymnasium.Env[Any, Any]]
    expert: Callable[[Vector, int], Vector]
    chunk: int
    executed: int
    disturbance: float
    starts: dict[str, float] | None = None


TASKS = {
    "pendulum": Task(
        make=lambda render_mode: gymnasium.make("Pendulum-v1", render_mode=render_mode),
        expert=lambda observation, side: swing_up(observation),
        chunk=4,
        executed=2,
        disturbance=0.3,
        starts={"x_init": np.pi, "y_init": 8.0},
    ),
    "reach": Task(make=lambda render_mode: ReachAround(), expert=walk_around, chunk=8, executed=6, disturbance=0.005),
}
