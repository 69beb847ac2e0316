"""Look for common mistakes in training and sampling, and suggest remedies."""

from __future__ import annotations

import copy
import dataclasses
import textwrap
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import CheckpointError, ConfigurationError, DatasetError
from .parser import CommandParser, add_data_options, add_device, command, command_imports, leaving_out

with command_imports("ddpm-doctor", __name__):
    import torch
    from diffusers import ModelMixin
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ..data.batches import Batch, BatchDataset
    from ..data.images import load_labelled_images, to_network_units
    from ..data.normalized import load_normalized
    from ..data.points import POINT_SETS, is_point_set
    from ..judge.checks import (
        MIN_SAMPLES,
        NUM_IMAGES,
        NUM_POINTS,
        Finding,
        Patient,
        check_point_columns,
        check_shape,
        examine,
    )
    from ..loading import load_checkpoint
    from ..training.options import PRESETS, ImageTrainingArguments, PointTrainingArguments
    from ..training.pipelines import (
        choose_resolution,
        default_batch_size,
        make_image_pipeline,
        make_point_pipeline,
    )
    from ..training.processes import choose_device
    from ..training.state import find_states
    from .presets import parse_options, read_preset


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="ddpm-doctor", description=__doc__)
    parser.add_argument("patient", help="a checkpoint folder, or a preset: a YAML file or a shipped one's name")
    dataset = "a point set's name, a file of points, or an image data set (default: the preset's)"
    number = f"samples to take losses on (default: {NUM_POINTS} points, {NUM_IMAGES} images)"
    add_data_options(parser, number, "train", dataset=dataset, required=False, fit="the preset's, or resize")
    parser.set_defaults(fit=None)
    parser.add_argument("--held_out_split", help="split to detect overfitting with (default: test, if there is one)")
    parser.add_argument("--label_column", help="the data's column of labels (default: that of the training)")
    parser.add_argument(
        "--guidance_scale", type=float, metavar="W", default=1.0, help="look at samples with this guidance, too"
    )
    parser.add_count("--resolution", "size of a preset's images, as in training")
    parser.add_argument("--channels", type=int, choices=[1, 3, 4], help="channels of a preset's images")
    add_device(parser)
    args = parser.parse_args(argv)
    with leaving_out(args.skip_corrupt) as on_corrupt:
        make_patient = _checkpoint_as_patient if Path(args.patient).is_dir() else _preset_as_patient
        patient = make_patient(args, on_corrupt)
    if patient.pipeline.config.columns is not None:
        findings = []  # the coding of a table keeps whole numbers and heavy tails
    elif patient.pipeline.is_points:
        findings = list(check_point_columns(args.dataset, patient.pipeline.config.data_columns))
    else:
        findings = [check_shape(args.dataset, args.split, patient.pipeline)]
    findings += examine(patient)
    for finding in findings:
        print(_show(finding))
    wrong = sum(finding.remedy is not None and not finding.is_open for finding in findings)
    print("nothing is wrong" if wrong == 0 else f"{wrong} finding{'s' if wrong > 1 else ''}")
    if wrong:
        raise SystemExit(1)


def _take(dataset: BatchDataset) -> Batch:
    """Return all samples in random order, because the timesteps of the losses rise from sample to sample."""
    if len(dataset) < MIN_SAMPLES:
        raise DatasetError(f"losses by timestep need at least {MIN_SAMPLES} samples, got {len(dataset)}")
    return dataset.__getitems__(_random_order(len(dataset)).tolist())


def _random_order(number: int) -> torch.Tensor:
    return torch.randperm(number, generator=torch.Generator().manual_seed(0))


def _load_raw(folder: Path, unet: ModelMixin) -> ModelMixin | None:
    """Return the network with its raw weights from the newest training state; `None` if there is no state."""
    weights = [path for state in find_states(folder) if (path := state / "model.safetensors").is_file()]
    if not weights:
        return None
    newest, raw = weights[-1], copy.deepcopy(unet)
    try:
        raw.load_state_dict(load_file(newest))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"can't load {newest}: {error}") from None
    return raw


def _checkpoint_as_patient(args: Namespace, on_corrupt: Callable[[str], None] | None) -> Patient:
    """Return a checkpoint's network and the data that the user names."""
    if args.dataset is None:
        raise ConfigurationError("a checkpoint is examined on its training data: name them with --dataset")
    if args.resolution or args.channels:
        raise ConfigurationError(
            "--resolution and --channels are for a preset, and a checkpoint has its own: leave them out"
        )
    pipeline = load_checkpoint(args.patient).to(choose_device(args.device))
    if args.label_column is not None:
        if not pipeline.num_classes:
            raise ConfigurationError(f"{args.patient} knows no classes: leave --label_column out")
        pipeline.register_to_config(label_column=args.label_column)
    args.split = args.split or "train"
    number = args.num_samples or (NUM_POINTS if pipeline.is_points else NUM_IMAGES)
    options = {"fit": args.fit or "resize", "noise": args.dataset_noise, "on_corrupt": on_corrupt}
    data = _take(load_normalized(pipeline, args.dataset, number, split=args.split, **options))
    if args.guidance_scale != 1 and not data.known:
        raise ConfigurationError("--guidance_scale needs labels or conditions: name the labels with --label_column")
    patient = Patient(pipeline, data, raw=_load_raw(Path(args.patient), pipeline.unet))
    patient.guidance_scale = args.guidance_scale
    if not pipeline.is_points:
        try:
            split = args.held_out_split or "test"
            patient.held_out = _take(load_normalized(pipeline, args.dataset, number, split=split, **options))
        except DatasetError:
            if args.held_out_split is not None:
                raise
    elif args.dataset in POINT_SETS:
        patient.held_out = _take(load_normalized(pipeline, args.dataset, number, seed=1, **options))
    return patient


def _preset_as_patient(args: Namespace, on_corrupt: Callable[[str], None] | None) -> Patient:
    """Return a preset's data and untrained network; the command line overrides the preset, as in training."""
    preset = read_preset(args.patient, PRESETS)
    of_images, of_points = (
        {field.name for field in dataclasses.fields(cls)} for cls in (ImageTrainingArguments, PointTrainingArguments)
    )
    is_points = is_point_set(args.dataset) if args.dataset else preset.keys().isdisjoint(of_images - of_points)
    typed = {"split": args.split, "resolution": args.resolution, "fit": args.fit, "channels": args.channels}
    typed["dataset_name"] = args.dataset
    if args.guidance_scale != 1:
        raise ConfigurationError("--guidance_scale is for a checkpoint, and a preset is not trained: leave it out")
    device = choose_device(args.device)
    if is_points:
        if args.resolution or args.channels:
            raise ConfigurationError("--resolution and --channels are for images: leave them out for points")
        typed = {"dataset": args.dataset, "dataset_noise": args.dataset_noise}
    typed["label_column"] = args.label_column
    argv = ["--config", args.patient, "--output_dir", "none"]
    argv += [f"--{name}={value}" for name, value in typed.items() if value is not None]
    options: PointTrainingArguments | ImageTrainingArguments
    if is_points:
        options = parse_options(PointTrainingArguments, argv, "", PRESETS)
        pipeline, data = make_point_pipeline(options)
        dataset = Batch(data.samples, data.class_labels, data.condition)
        options.train_batch_size = options.train_batch_size or default_batch_size(len(data))
        args.dataset, number = options.dataset, args.num_samples or NUM_POINTS
    else:
        options = parse_options(ImageTrainingArguments, argv, "", PRESETS)
        choose_resolution(options)
        form = options.resolution, options.fit, options.channels
        images, labels, names = load_labelled_images(
            options.dataset_name, options.label_column, options.split, *form, on_corrupt=on_corrupt
        )
        pipeline, dataset = make_image_pipeline(options, tuple(images.shape[1:]), names), Batch(images, labels)
        args.dataset, args.split, number = options.dataset_name, options.split, args.num_samples or NUM_IMAGES
    size = len(dataset.x_0)
    rows = _random_order(size)[:number]
    chosen = dataset.take(rows)
    if not is_points:
        chosen = chosen._replace(x_0=to_network_units(chosen.x_0))
    return Patient(pipeline.to(device), chosen, options=options, dataset_size=size)


def _show(finding: Finding) -> str:
    mark = "--" if finding.is_open else "ok" if finding.remedy is None else "!!"
    text = f"{finding.check}: {finding.message}"
    lines = textwrap.wrap(text, 100, subsequent_indent="      ", break_on_hyphens=False)
    if finding.remedy is not None:
        lines += textwrap.wrap(f"→ {finding.remedy}", 100, initial_indent="      ", subsequent_indent="        ")
    return f"{mark:4}" + "\n".join(lines)


if __name__ == "__main__":
    main()
