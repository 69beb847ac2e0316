"""Tune a checkpoint to a few network calls: accelerate launch train_scripts/tune.py --checkpoint CHECKPOINT …"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

from .parser import checkpoint_folder, command, command_imports

with command_imports("ddpm-tune", __name__):
    from ..export.compile import compile_scheduler
    from ..files import whole_file
    from ..table_scheduler import StepTableScheduler
    from ..training.options import PRESETS, CheckpointTuningArguments
    from ..training.processes import this_process
    from ..training.run import check_output_dir
    from ..training.tuning import tune
    from .few_calls import FIGURES, Candidate, load_data, load_pipeline, make_features, measure, stock_candidates
    from .presets import parse_options

REPORT = "tune.json"


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_options(CheckpointTuningArguments, argv, __doc__, PRESETS)
    check_output_dir(args, *FIGURES, REPORT)
    begun, checkpoint, process = time.monotonic(), checkpoint_folder(args.checkpoint), this_process()
    args.checkpoint = str(checkpoint)
    pipeline, frozen = load_pipeline(args), load_pipeline(args)
    with process.local_main_process_first():
        data = load_data(args, pipeline)
    frozen.to(process.device).unet.requires_grad_(False).eval()
    losses, held_out = tune(pipeline, data, make_features(args.features, frozen, data), args)
    if not process.is_main_process:
        return
    seconds, output = time.monotonic() - begun, Path(args.output_dir)
    candidates = stock_candidates(frozen, checkpoint, [args.num_calls])
    if isinstance(frozen.scheduler, StepTableScheduler):
        for number in frozen.scheduler.tables:
            candidates.append(
                Candidate("weights as they were", compile_scheduler(frozen.scheduler, number), checkpoint)
            )
    table = compile_scheduler(pipeline.scheduler, args.num_calls)
    candidates.append(Candidate("tuned", table, output, shown=True))
    report = measure(args, frozen, data, held_out, candidates)
    report.draw(output, [table], frozen)
    content = {"options": dataclasses.asdict(args), "seconds": round(seconds, 1), "losses": losses}
    with whole_file(output / REPORT, overwrite=True) as temporary:
        temporary.write_text(json.dumps(content | report.to_dict(), indent=2), encoding="utf-8")
    print(f"{args.checkpoint} on {args.dataset}: {report.title}")
    print(report)
    print(f"tuned in {seconds:.0f} s")
    print(args.output_dir)


if __name__ == "__main__":
    main()
