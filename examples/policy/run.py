"""Run a policy's episodes: python examples/policy/run.py reach reach-onnx

Needs numpy, onnxruntime and gymnasium (for the pendulum's film also pygame), but not torch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from tasks import TASKS, ReachAround, Task

from ddpm_mlp_pipeline import OnnxSampler

Policy = Callable[[npt.NDArray[Any], int], npt.NDArray[Any]]
"""Gives actions, `[chunk, action_dim]`, for an observation and the decision's number."""


def bundle_policy(sampler: OnnxSampler, task: Task, seed: int, **asked: Any) -> Policy:
    """Return the policy that draws its actions from a bundle, each decision with the next sample's noise."""

    def decide(observation: npt.NDArray[Any], decision: int) -> npt.NDArray[Any]:
        samples = range(decision, decision + 1)
        return sampler.sample(samples, seed, condition=observation, **asked)[0].reshape(task.chunk, -1)

    return decide


def run_episode(
    task: Task, policy: Policy, seed: int, rate: float | None = None, film: list[Image.Image] | None = None
) -> dict[str, Any]:
    """Run one episode.

    Args:
        task: the task.
        policy: the policy.
        seed: of the environment.
        rate: actions a second, or `None` for as many as the machine can.
        film: a list to append a picture to after each action.

    Returns:
        `return`, `seconds` (of each decision), `late` (actions that came after their time), `path`, and the last
        `info` of the environment.
    """
    env = task.make("rgb_array" if film is not None else None)
    observation, _ = env.reset(seed=seed)
    total, seconds, late, path, done, actions = 0.0, [], 0, [observation], False, []
    due = time.perf_counter()
    while not done:
        if not actions:
            begun = time.perf_counter()
            actions = [*policy(observation, len(seconds))[: task.executed]]
            seconds.append(time.perf_counter() - begun)
        if rate is not None:
            due += 1 / rate
            late += time.perf_counter() > due
            time.sleep(max(0.0, due - time.perf_counter()))
        observation, reward, terminated, truncated, info = env.step(actions.pop(0))
        total, done = total + float(reward), terminated or truncated
        path.append(observation)
        if film is not None:
            film.append(picture(np.array(path)) if isinstance(env, ReachAround) else rendered(env))
    env.close()
    return {"return": total, "seconds": seconds, "late": late, "path": np.array(path), **info}


def rendered(env: Any) -> Image.Image:
    return Image.fromarray(env.render()).resize((SIZE, SIZE))


SIZE = 240  # pixels


def picture(*paths: npt.NDArray[Any]) -> Image.Image:
    """Draw the disc, the goal and some paths around it."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    draw = ImageDraw.Draw(image)

    def circle(x: float, y: float, radius: float, colour: str) -> None:
        left, top = pixel(x - radius, y + radius)
        draw.ellipse((left, top, *pixel(x + radius, y - radius)), fill=colour)

    def pixel(x: float, y: float) -> tuple[float, float]:
        return SIZE * (x + 1.2) / 2.4, SIZE * (1.2 - y) / 2.4

    circle(0, 0, ReachAround.RADIUS, "#888888")
    circle(*ReachAround.GOAL, ReachAround.GOAL_RADIUS, "#99dd99")
    for path in paths:
        colour = "#cc4422" if path[len(path) // 2, 0] < 0 else "#2255cc"
        draw.line([pixel(*position) for position in path], fill=colour, width=2)
        circle(*path[-1], 0.03, colour)
    return image


def summary(task: str, results: list[dict[str, Any]]) -> str:
    """Return the outcome of some episodes and the time of their decisions, in one line."""
    milliseconds = 1000 * np.concatenate([result["seconds"] for result in results])
    if task == "reach":
        sides = [np.sign(result["path"][np.abs(result["path"][:, 0]).argmax(), 0]) for result in results]
        passed = sum(result["passed"] for result in results)
        outcome = f"{passed} of {len(results)} passed, {sides.count(-1)} on the left, {sides.count(1)} on the right"
    else:
        returns = [result["return"] for result in results]
        outcome = f"mean return {np.mean(returns):.1f} of {len(results)} (lowest {np.min(returns):.1f})"
    median, late = np.median(milliseconds), np.percentile(milliseconds, 99)
    return f"{outcome}; a decision takes {median:.3f} ms (99th percentile {late:.3f} ms)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("bundle", nargs="?", help="by default the expert acts")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the first episode (default: 0)")
    parser.add_argument("--num_calls", type=int, help="draw with the table of that many network calls")
    parser.add_argument("--deadline_ms", type=float, help="draw with the largest table that fits")
    parser.add_argument("--rate", type=float, help="actions a second (default: as many as possible)")
    parser.add_argument("--film", help="write a .gif of the first three episodes")
    args = parser.parse_args()
    task, results, film = TASKS[args.task], [], []
    asked = {"num_calls": args.num_calls, "deadline_ms": args.deadline_ms}
    sampler = None if args.bundle is None else OnnxSampler(args.bundle, num_threads=1)
    rng = np.random.default_rng(args.seed)
    for seed in range(args.seed, args.seed + args.episodes):
        side = int(rng.choice([-1, 1]))
        policy = bundle_policy(sampler, task, seed, **asked) if sampler else expert_policy(task, side)
        is_filmed = args.film is not None and seed < args.seed + 3
        results.append(run_episode(task, policy, seed, args.rate, film if is_filmed else None))
    print(summary(args.task, results))
    if args.deadline_ms is not None:
        milliseconds = 1000 * np.concatenate([result["seconds"] for result in results])
        print(f"{(milliseconds <= args.deadline_ms).mean():.2%} of {len(milliseconds)} decisions kept the deadline")
    if args.rate is not None:
        actions = sum(len(result["path"]) - 1 for result in results)
        print(f"{sum(result['late'] for result in results)} of {actions} actions were late")
    if film:
        first, *others = [frame.quantize(32) for frame in film[::2]]
        first.save(args.film, save_all=True, append_images=others, duration=60, loop=0)
    assert "torch" not in sys.modules


def expert_policy(task: Task, side: int) -> Policy:
    """Return the expert, who decides on each action anew."""
    return lambda observation, decision: task.expert(observation, side)[None]


if __name__ == "__main__":
    main()
