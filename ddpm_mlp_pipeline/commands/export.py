"""Export a checkpoint to a folder that samples without PyTorch."""

from __future__ import annotations

import contextlib
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import ConfigurationError, explain_missing_extra
from ..export.page import PAGE_ENTRIES, write_page
from ..export.schedulers import SCHEDULERS, scheduler_option
from ..files import check_folder
from ..runtime.bundle import read_info
from ..runtime.step_table import StepTable
from .asking import add_guidance_options
from .parser import CommandParser, add_overwrite, command


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="ddpm-export", description=__doc__)
    parser.add_checkpoint("checkpoint")
    parser.add_argument("bundle", type=Path, help="the folder to write")
    parser.add_argument(
        "--scheduler",
        choices=SCHEDULERS,
        help="scheduler to sample with (default: ddim for points; for images dpmsolver_multistep with "
        "algorithm_type=sde-dpmsolver++; ddpm if these diverge)",
    )
    parser.add_argument(
        "--scheduler_options",
        type=scheduler_option,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="options of the scheduler's diffusers class that differ from training (use_karras_sigmas=true), "
        "or of its step method (eta=1)",
    )
    parser.add_count("--num_inference_steps", "sampling steps (default: 50; 20 with the default scheduler for images)")
    parser.add_argument(
        "--sampler",
        nargs="?",
        choices=["float32", "uint8"],
        const="float32",
        help="also write sampler.onnx, the sampling loop as one graph, with samples of this type (default: float32)",
    )
    parser.add_argument(
        "--precision",
        choices=["fp32", "fp16", "int8"],
        default="fp32",
        help="precision of the network: fp16 halves the file, int8 also speeds up convolutions (default: fp32)",
    )
    parser.add_argument("--web", type=Path, metavar="DIR", help="also write a static page that samples in the browser")
    parser.add_argument(
        "--onnxruntime_web",
        type=Path,
        metavar="DIR",
        help="the unpacked npm package for --web (default: downloaded once from the npm registry)",
    )
    parser.add_argument("--sampler_takes_known", action="store_true", help="let sampler.onnx take known values, too")
    parser.add_count("--fit", "first fit a table of N network calls to --dataset, as ddpm-fit does")
    parser.add_argument("--dataset", help="data for --fit: a point set, a file of points, or an image data set")
    add_guidance_options(parser)
    parser.add_argument(
        "--null_label", type=int, metavar="N", help='the class by which a stock UNet2DModel knows "none"'
    )
    add_overwrite(parser)
    args = parser.parse_args(argv)
    if args.onnxruntime_web is not None and args.web is None:
        raise ConfigurationError("--onnxruntime_web needs --web: pass --web DIR")
    if args.web is not None:  # before the work; export_bundle checks the bundle's folder
        check_folder(args.web, PAGE_ENTRIES.__contains__, args.overwrite)
    with explain_missing_extra("ddpm-export", "export"):
        from ..export.exporter import export_bundle, is_own
    checkpoint = args.checkpoint
    with contextlib.ExitStack() as stack:
        if args.fit is not None:
            check_folder(args.bundle, is_own, args.overwrite)
            checkpoint = stack.enter_context(_fitted(args))
        report = export_bundle(
            checkpoint,
            args.bundle,
            args.scheduler,
            args.num_inference_steps,
            sampler=args.sampler,
            precision=args.precision,
            scheduler_options=dict(args.scheduler_options),
            guidance_scale=args.guidance_scale if args.fit is None else None,  # a fitted table has its own
            guidance_interval=args.guidance_interval,
            null_label=args.null_label,
            sampler_takes_known=args.sampler_takes_known,
            overwrite=args.overwrite,
        )
    print(report)
    size = sum(file.stat().st_size for file in args.bundle.iterdir())
    nested = read_info(args.bundle / "bundle.json")["nested_tables"]
    others = f", nested tables of {', '.join(map(str, nested))} calls" if nested else ""
    print(f"{args.bundle}: {StepTable.load(args.bundle / 'step_table.json').summary}{others}, {size / 1024:.0f} KiB")
    if args.web is not None:
        write_page(args.bundle, args.web, args.onnxruntime_web, args.overwrite)
        print(f"{args.web}: a page for browsers; python -m http.server --directory {args.web}")


@contextlib.contextmanager
def _fitted(args: Namespace) -> Iterator[Path]:
    """Yield a temporary checkpoint with the table that `--fit` asks for."""
    if args.dataset is None:
        raise ConfigurationError("--fit needs data: name them with --dataset")
    if args.scheduler or args.scheduler_options or args.num_inference_steps:
        raise ConfigurationError("--fit makes the steps itself: leave out --scheduler and --num_inference_steps")
    if args.guidance_interval is not None:
        raise ConfigurationError("--fit finds the guidance of each call itself: leave out --guidance_interval")
    from . import fit

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / args.checkpoint.resolve().name  # the bundle's provenance names it
        options: tuple[object, ...] = ("--dataset", args.dataset, "--num_calls", args.fit)
        if args.null_label is not None:
            options += ("--null_label", args.null_label)
        if args.guidance_scale not in (None, 1):
            options += ("--guidance_scale", args.guidance_scale)
        fit.fit(fit.make_parser().parse_args([str(word) for word in (args.checkpoint, checkpoint, *options)]))
        yield checkpoint


if __name__ == "__main__":
    main()
