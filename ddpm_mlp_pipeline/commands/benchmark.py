"""Time a bundle against the torch pipeline that it was exported from, with the same weights and schedulers."""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import timeit
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from ..errors import BundleError, ConfigurationError, explain_missing_extra
from ..runtime.bundle import seal
from ..runtime.sampler import OnnxSampler
from .asking import add_guidance_options
from .parser import CommandParser, command

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


# Largest relative error between outputs of the same weights. Half precision causes 1e-3, 8 bits 0.1, other weights 1.
SAME_WEIGHTS = {"float": 5e-3, "int8": 0.2}
DDPM_STEPS, DDIM_STEPS = 1000, 50  # at most the number of training timesteps
Row = tuple[str, float, float]
PAUSE = 0.2  # seconds, after which the threads of the previous contender sleep
PRODUCT_SIZE = 2048  # rows and columns of the matrices whose product measures the machine's peak
# The program of a user without the bundle, from a fresh process to a picture
TORCH_PROCESS = """
import sys
from diffusers import DDIMScheduler
from ddpm_mlp_pipeline.pipeline import DDPMMLPPipeline
from ddpm_mlp_pipeline.runtime.pictures import draw_points, image_grid
pipeline = DDPMMLPPipeline.from_pretrained(sys.argv[1])
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
samples = pipeline(int(sys.argv[2]), num_inference_steps=int(sys.argv[4]), output_type="np")[0]
picture = draw_points(samples) if samples.ndim == 2 else image_grid([samples], len(samples))
picture.save(sys.argv[3])
"""
# Run a command, and print its seconds and its peak memory. The peak includes the memory of the process that forked
# it, which is therefore this small one rather than the benchmark with torch.
LAUNCHER = """
import os, sys, time
start = time.perf_counter()
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0)
print(time.perf_counter() - start, usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="ddpm-benchmark", description=__doc__)
    parser.add_checkpoint("checkpoint")
    parser.add_argument("bundle", type=Path, help="a bundle exported from it")
    parser.add_count("--batch_sizes", "(default: 1 1000)", nargs="+", default=[1, 1000])
    parser.add_count("--num_inference_steps", "DDPM steps (default: 1000, at most the number of training timesteps)")
    parser.add_count("--repeats", "runs of which to take medians (default: 5)", default=5)
    parser.add_argument(
        "--against", type=Path, metavar="BUNDLE", help="another bundle, such as one without labels, to time a call of"
    )
    add_guidance_options(parser)
    args = parser.parse_args(argv)
    no_guidance = {"guidance_scale": 1.0}  # a fitted table may have its own
    guidance = {"guidance_scale": args.guidance_scale, "guidance_interval": args.guidance_interval}
    if args.guidance_scale is None and args.guidance_interval is not None:
        raise ConfigurationError("--guidance_interval needs --guidance_scale")
    # Their errors now, rather than after minutes
    other = None if args.against is None else OnnxSampler(args.against)
    if args.guidance_scale is not None:
        OnnxSampler(args.bundle).sample(1, **guidance)
    with explain_missing_extra("ddpm-benchmark", "export"):
        import torch
        from diffusers import DDIMScheduler
        from tabulate import tabulate

        from ..export.compile import compile_scheduler
        from ..loading import load_checkpoint

    pipeline = load_checkpoint(args.checkpoint)
    _check_same_weights(pipeline, args.bundle)
    trained = pipeline.scheduler.config.num_train_timesteps
    ddpm_steps, ddim_steps = args.num_inference_steps or min(DDPM_STEPS, trained), min(DDIM_STEPS, trained)
    pipeline.scheduler = _ddpm(pipeline.scheduler)
    table = compile_scheduler(pipeline.scheduler, ddpm_steps)
    rows, calls = [], []
    with tempfile.TemporaryDirectory() as folder:
        # A copy of the bundle, so that its step table can be replaced
        bundle = Path(folder) / "bundle"
        shutil.copytree(args.bundle, bundle)
        table.save(bundle / "step_table.json")
        seal(bundle)
        own = OnnxSampler(args.bundle)
        own_steps = f"{len(own)} {own.table.scheduler.removesuffix('Scheduler')} steps"
        with (
            _contender(_torch_sampler, args.checkpoint, ddpm_steps) as torch_contender,
            _contender(_bundle_sampler, bundle) as bundle_contender,
            _contender(_bundle_sampler, args.bundle) as own_contender,
        ):
            if args.guidance_scale is not None:
                guided = [
                    functools.partial(_sampling_seconds, own_contender, asked=asked)
                    for asked in (no_guidance, guidance)
                ]
                calls += _compare(f"guidance {args.guidance_scale:g}", guided, (len(own), len(own)), args)
            if other is not None:
                with _contender(_bundle_sampler, args.against) as other_contender:
                    both = [functools.partial(_sampling_seconds, each) for each in (other_contender, own_contender)]
                    calls += _compare(f"{args.bundle} for {args.against}", both, (len(other), len(own)), args)
            for size in args.batch_sizes:
                contenders = [torch_contender, bundle_contender, own_contender]
                works = [functools.partial(_sampling_seconds, contender, size) for contender in contenders]
                torch_time, bundle_time, own_time = (1000 * time / size for time in _alternate(works, args.repeats))
                what = "one at a time" if size == 1 else f"{size} together"
                steps = f"{ddpm_steps} DDPM steps"
                rows.append((f"{what}, {steps}, ms per sample", torch_time, bundle_time))
                rows.append((f"{what}, {steps} against {own_steps}", torch_time, own_time))

        table = compile_scheduler(DDIMScheduler.from_config(pipeline.scheduler.config), ddim_steps)
        table.save(bundle / "step_table.json")
        seal(bundle)
        number = 2000 if own.is_points else 16
        picture = Path(folder) / "samples.png"
        torch_process = [sys.executable, "-c", TORCH_PROCESS]
        torch_process += [str(args.checkpoint), str(number), str(picture), str(ddim_steps)]
        bundle_process = [sys.executable, "-m", f"{__package__}.sample", str(bundle), "--num_samples", str(number)]
        bundle_process += ["--output", str(picture), "--overwrite"]
        torch_run, bundle_run = _alternate(
            [lambda: _process(torch_process), lambda: _process(bundle_process)], args.repeats
        )
        what = f"process start to picture of {number}, {ddim_steps} DDIM steps"
        rows.append((f"{what}, s", torch_run[0], bundle_run[0]))
        rows.append((f"{what}, peak MiB", torch_run[1], bundle_run[1]))

    share = _share_of_peak(pipeline, own, min(64, max(args.batch_sizes)))
    versions = f"torch {torch.__version__}, onnxruntime {ort.__version__}"
    print(f"{versions}, {own.num_threads} cores; medians of {args.repeats}")
    cells = [(*row, f"{row[1] / row[2]:.1f}×") for row in rows]
    alignment = ("left", "right", "right", "right")
    print(tabulate(cells, ("", "torch", "bundle", "ratio"), "plain", ".4g", colalign=alignment))
    if calls:
        cells = [(*row, f"{row[2] / row[1]:.3f}×") for row in calls]
        print()
        print(tabulate(cells, ("ms per step", "without", "with", "ratio"), "plain", ".4g", colalign=alignment))
    print(share)


def _share_of_peak(pipeline: DiffusionPipeline, sampler: OnnxSampler, batch_size: int) -> str:
    """Return a line with the multiply-adds per second of the bundle's network and of a large matrix product."""
    import onnx
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    x = np.zeros((batch_size, *sampler.sample_shape), dtype=np.float32)
    # The counter knows only the plain implementation of attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        pipeline.unet(torch.from_numpy(x), 500)
    multiply_adds = counter.get_total_flops() / 2

    matrix = f"float[{PRODUCT_SIZE}, {PRODUCT_SIZE}]"
    product = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]>'
        f"product ({matrix} a, {matrix} b) => ({matrix} c) {{ c = MatMul(a, b) }}"
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = sampler.num_threads
    session = ort.InferenceSession(product.SerializeToString(), options)
    factors = dict.fromkeys(("a", "b"), np.ones((PRODUCT_SIZE, PRODUCT_SIZE), dtype=np.float32))

    # All runs of one before those of the other, since a session's busily waiting threads slow the other session.
    timers = timeit.Timer(lambda: session.run(None, factors)), timeit.Timer(lambda: sampler.predict(x, 500))
    product_s, network_s = (float(np.median(timer.repeat(21, number=1)[1:])) for timer in timers)
    rate, peak = multiply_adds / network_s / 1e9, PRODUCT_SIZE**3 / product_s / 1e9
    return (
        f"the network, batch {batch_size}: {1000 * network_s:.3g} ms for {multiply_adds / 1e9:.3g} G multiply-adds, "
        f"{rate:.3g} G/s: {rate / peak:.0%} of the {peak:.3g} G/s of a matrix product"
    )


def _alternate(works: Sequence[Callable[[], Any]], repeats: int) -> tuple[Any, ...]:
    """Run the works in turn, so that other load slows all alike; return the median results, without a warm-up run."""
    runs = [[work() for work in works] for _ in range(repeats + 1)][1:]
    return tuple(np.median(results, axis=0) for results in zip(*runs, strict=True))


def _compare(what: str, works: Sequence[Callable[[int], float]], steps: tuple[int, int], args: Namespace) -> list[Row]:
    """Return a row for each batch size: the milliseconds per step of two works, which draw a number of samples."""
    rows = []
    for size in args.batch_sizes:
        without, with_ = _alternate([functools.partial(work, size) for work in works], args.repeats)
        rows.append((f"{what}, {size} together", 1000 * without / steps[0], 1000 * with_ / steps[1]))
    return rows


_draw: Callable[..., object]  # set in a contender's process: draw a number of samples together


def _contender(open_sampler: Callable[..., Callable[..., object]], *args: Any) -> ProcessPoolExecutor:
    """Return a process that draws with `open_sampler(*args)`.

    In one process, the busily waiting threads of torch and of onnxruntime would slow each other.
    """
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _open, (open_sampler, args))


def _open(open_sampler: Callable[..., Callable[..., object]], args: tuple[Any, ...]) -> None:
    global _draw
    _draw = open_sampler(*args)


def _seconds(num_samples: int, asked: dict[str, Any]) -> float:
    return timeit.timeit(lambda: _draw(num_samples, **asked), number=1)


def _sampling_seconds(contender: ProcessPoolExecutor, num_samples: int, asked: dict[str, Any] | None = None) -> float:
    time.sleep(PAUSE)
    return contender.submit(_seconds, num_samples, asked or {}).result()


def _ddpm(like: SchedulerMixin) -> SchedulerMixin:
    """Return a DDPM scheduler with the noise schedule of `like`, and a fixed variance, which both sides can sample."""
    from ..export.compile import make_scheduler

    learns_variance = "learned" in like.config.get("variance_type", "")
    return make_scheduler("ddpm", like, **({"variance_type": "fixed_large"} if learns_variance else {}))


def _torch_sampler(checkpoint: Path, num_inference_steps: int) -> Callable[..., object]:
    from ..loading import load_checkpoint

    pipeline = load_checkpoint(checkpoint)
    pipeline.scheduler = _ddpm(pipeline.scheduler)
    return lambda num_samples: pipeline(num_samples, None, num_inference_steps, "np")


def _bundle_sampler(bundle: Path) -> Callable[..., object]:
    sampler = OnnxSampler(bundle)
    return lambda num_samples, **asked: sampler.sample(num_samples, batch_size=num_samples, **asked)


def _process(argv: list[str]) -> tuple[float, float]:
    """Run a command; return its wall time in seconds and its peak resident memory in MiB."""
    result = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *argv],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if result.returncode:
        raise RuntimeError(result.stderr)
    seconds, peak = map(float, result.stdout.split()[-2:])
    return seconds, peak / (1024 if sys.platform != "darwin" else 1024**2)


def _check_same_weights(pipeline: DiffusionPipeline, bundle: Path) -> None:
    import torch

    sampler = OnnxSampler(bundle)
    if sampler.sample_shape == pipeline.sample_shape:
        x = np.random.default_rng(0).standard_normal((2, *sampler.sample_shape)).astype(np.float32)
        with torch.no_grad():
            output = pipeline.unet(torch.from_numpy(x), 500).sample
        found = sampler.predict(x, 500)
        expected = output[:, : found.shape[1]].numpy()  # many a bundle leaves out a learned variance
        error = np.sqrt(np.square(found - expected).mean() / np.square(expected).mean())
        precision = sampler.info.get("provenance", {}).get("precision")
        if error < SAME_WEIGHTS["int8" if precision == "int8" else "float"]:
            return
    raise BundleError(f"{bundle} was not exported from this checkpoint: export it again with ddpm-export")


if __name__ == "__main__":
    main()
