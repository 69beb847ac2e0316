"""Compare a bundle with the torch pipeline's time, and with a regression: python examples/policy/compare.py --help"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet
import torch
from diffusers import DDIMScheduler
from run import Policy, bundle_policy, run_episode, summary
from tasks import TASKS, Task

from ddpm_mlp_pipeline import DDPMMLPPipeline, MLPModel, OnnxSampler, load_checkpoint
from ddpm_mlp_pipeline.table_scheduler import StepTableScheduler


def regression(task: Task, demonstrations: str, checkpoint: str, steps: int = 3000) -> Policy:
    """Train the checkpoint's network to predict the mean of the actions, and return it as a policy.

    It is the same network with the same number of weights; its noisy input and its timestep are always 0.
    """
    torch.manual_seed(0)
    model = MLPModel.from_config(load_checkpoint(checkpoint).unet.config)
    table = pyarrow.parquet.read_table(demonstrations).to_pandas()
    observations, actions = (
        torch.tensor(table[[name for name in table if name[0] == kind]].to_numpy(), dtype=torch.float32)
        for kind in "oa"
    )
    (o_mean, o_std), (a_mean, a_std) = ((values.mean(0), values.std(0)) for values in (observations, actions))
    conditions, targets = (observations - o_mean) / o_std, (actions - a_mean) / a_std
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(targets), (1024,))
        output = model(torch.zeros(1024, targets.shape[1]), 0, condition=conditions[rows]).sample
        loss = (output - targets[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"regression: {sum(p.numel() for p in model.parameters()):,} weights, mean squared error {loss.item():.4f}")

    @torch.no_grad()
    def decide(observation: npt.NDArray[Any], decision: int) -> npt.NDArray[Any]:
        condition = (torch.tensor(observation, dtype=torch.float32) - o_mean) / o_std
        output = model(torch.zeros(1, len(a_mean)), 0, condition=condition[None]).sample[0]
        return (output * a_std + a_mean).double().numpy().reshape(task.chunk, -1)

    return decide


def torch_policy(checkpoint: str, task: Task, num_inference_steps: int = 10) -> Policy:
    """Return the policy that draws its actions with torch, in DDIM steps."""
    pipeline = load_checkpoint(checkpoint)
    assert isinstance(pipeline, DDPMMLPPipeline)
    assert not isinstance(pipeline.scheduler, StepTableScheduler)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)

    def decide(observation: npt.NDArray[Any], decision: int) -> npt.NDArray[Any]:
        drawn = pipeline(condition=observation, num_inference_steps=num_inference_steps, generator=generator)
        return drawn.points[0].reshape(task.chunk, -1)

    return decide


def decision_times(policies: dict[str, Policy], observations: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """Return the milliseconds of each policy's decisions.

    The policies take turns of 50 decisions, before which one is not timed: a policy that decided right after another
    would pay for what that one has pushed out of the processor's caches.
    """
    times: dict[str, list[float]] = {name: [] for name in policies}
    for start in range(0, len(observations), 50):
        for name, decide in policies.items():
            decide(observations[start], start)
            for decision, observation in enumerate(observations[start : start + 50], start):
                begun = time.perf_counter()
                decide(observation, decision)
                times[name].append(1000 * (time.perf_counter() - begun))
    return {name: np.array(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("demonstrations", help="the .parquet file")
    parser.add_argument("checkpoint", help="the checkpoint folder, as trained")
    parser.add_argument("bundle", help="the bundle of its fitted tables")
    parser.add_argument("--decisions", type=int, default=1000, help="decisions to time (default: 1,000)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task, sampler = TASKS[args.task], OnnxSampler(args.bundle, num_threads=1)
    decide = regression(task, args.demonstrations, args.checkpoint)
    print("regression:", summary(args.task, [run_episode(task, decide, seed) for seed in range(100)]))
    by_torch = torch_policy(args.checkpoint, task)
    print("torch, 10 DDIM steps:", summary(args.task, [run_episode(task, by_torch, seed) for seed in range(10)]))

    policies = {"torch": by_torch}
    for calls in sorted(sampler.tables, reverse=True):
        policies[f"bundle, {calls} calls"] = bundle_policy(sampler, task, 0, num_calls=calls)
    columns = [f"o{i}" for i in range(len(sampler.condition_columns))]
    table = pyarrow.parquet.read_table(args.demonstrations, columns=columns).to_pandas()
    times = decision_times(policies, table.sample(args.decisions, random_state=0).to_numpy())
    for name, values in times.items():
        ratios = [np.percentile(times["torch"], q) / np.percentile(values, q) for q in (50, 99)]
        print(
            f"{name}: median {np.median(values):.3f} ms, 99th percentile {np.percentile(values, 99):.3f} ms; "
            f"{ratios[0]:.1f} and {ratios[1]:.1f} times less than torch"
        )


if __name__ == "__main__":
    main()
