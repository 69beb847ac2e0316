"""Export a checkpoint to a folder that samples without PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigurationError, explain_missing_extra
from ..export.page import PAGE_ENTRIES, write_page
from ..export.schedulers import SCHEDULERS, scheduler_option
from ..files import check_folder
from ..runtime.step_table import StepTable
from .parser import CommandParser, add_overwrite, command, positive_int


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="ddpm-export", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder")
    parser.add_argument("bundle", type=Path, help="the folder to write")
    parser.add_argument(
        "--scheduler",
        choices=SCHEDULERS,
        help="sampler (default: ddim for points; for images dpmsolver_multistep with algorithm_type=sde-dpmsolver++; "
        "ddpm where these blow up)",
    )
    parser.add_argument(
        "--scheduler_options",
        type=scheduler_option,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="of the diffusers class, where they are to differ from those of training (use_karras_sigmas=true), "
        "or of its steps (eta=1)",
    )
    parser.add_argument(
        "--num_inference_steps",
        type=positive_int,
        metavar="N",
        help="sampling steps (default: 50; 20 of the images' default)",
    )
    parser.add_argument(
        "--sampler",
        nargs="?",
        choices=["float32", "uint8"],
        const="float32",
        help="also write sampler.onnx, the whole sampler as one graph, and which samples it has (default: float32)",
    )
    parser.add_argument(
        "--precision",
        choices=["fp32", "fp16", "int8"],
        default="fp32",
        help="of the network: fp16 halves the file, int8 makes convolutions faster, too (default: fp32)",
    )
    parser.add_argument("--web", type=Path, metavar="DIR", help="also write a static page that samples in the browser")
    parser.add_argument(
        "--onnxruntime_web",
        type=Path,
        metavar="DIR",
        help="the unpacked npm package, for --web without a network (default: downloaded once from the npm registry)",
    )
    add_overwrite(parser)
    args = parser.parse_args(argv)
    if args.onnxruntime_web is not None and args.web is None:
        raise ConfigurationError("--onnxruntime_web is for --web DIR, which is missing")
    if args.web is not None:  # before the work; export_bundle looks after the bundle
        check_folder(args.web, PAGE_ENTRIES.__contains__, args.overwrite)
    with explain_missing_extra("ddpm-export", "export"):
        from ..export.exporter import export_bundle
    report = export_bundle(
        args.checkpoint,
        args.bundle,
        args.scheduler,
        args.num_inference_steps,
        sampler=args.sampler,
        precision=args.precision,
        scheduler_options=dict(args.scheduler_options),
        overwrite=args.overwrite,
    )
    print(report)
    size = sum(file.stat().st_size for file in args.bundle.iterdir())
    print(f"{args.bundle}: {StepTable.load(args.bundle / 'step_table.json').summary}, {size / 1024:.0f} KiB")
    if args.web is not None:
        write_page(args.bundle, args.web, args.onnxruntime_web, args.overwrite)
        print(f"{args.web}: a page for browsers; python -m http.server --directory {args.web}")


if __name__ == "__main__":
    main()
