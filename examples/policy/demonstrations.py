"""Write an expert's demonstrations: python examples/policy/demonstrations.py reach demos.parquet

Each row has an observation, o0, o1 …, and the expert's next actions from there, a0, a1 …
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet
from tasks import TASKS, Task


def plan(task: Task, env: gymnasium.Env[Any, Any], observation: npt.NDArray[Any], side: int) -> npt.NDArray[Any]:
    """Return the expert's next actions, `[chunk, action_dim]`, without taking them."""
    env, actions = copy.deepcopy(env), []
    for _ in range(task.chunk):
        actions.append(task.expert(observation, side))
        observation = env.step(actions[-1])[0]
    return np.array(actions)


def demonstrate(task: Task, episodes: int, seed: int = 0) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return observations, `[rows, observation_dim]`, and actions, `[rows, chunk * action_dim]`, of some episodes."""
    rng, env = np.random.default_rng(seed), task.make(None)
    observations, chunks = [], []
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed + episode, options=task.starts if episode % 2 else None)
        side, done = int(rng.choice([-1, 1])), False
        while not done:
            actions = plan(task, env.unwrapped, observation, side)
            observations.append(observation)
            chunks.append(actions.ravel())
            disturbed = actions[0] + task.disturbance * rng.normal(size=actions[0].shape)
            observation, _, terminated, truncated, _ = env.step(disturbed)
            done = terminated or truncated
    return np.array(observations), np.array(chunks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("output", help="a .parquet file")
    parser.add_argument("--episodes", type=int, default=300)
    parser.add_argument("--seed", type=int, default=10_000, help="of the first episode (default: 10,000)")
    args = parser.parse_args()
    observations, actions = demonstrate(TASKS[args.task], args.episodes, args.seed)
    columns = {f"o{i}": values for i, values in enumerate(observations.T)}
    columns |= {f"a{i}": values for i, values in enumerate(actions.T)}
    pyarrow.parquet.write_table(pyarrow.table(columns), args.output)
    print(f"{args.output}: {len(actions)} rows of {args.episodes} episodes")


if __name__ == "__main__":
    main()
