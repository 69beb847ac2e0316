"""`export_bundle`: write a checkpoint as a bundle folder, and check the bundle against the torch pipeline."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import math
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from onnxscript import opset20 as op

import ddpm_mlp_pipeline

from ..errors import ConfigurationError, DivergenceError, ParityError
from ..files import check_folder, whole_folder
from ..loading import load_checkpoint, quiet
from ..pipeline import DDPMMLPPipeline
from ..runtime.bundle import FORMAT, INPUTS, OPTIONAL_INPUTS, VERSION, is_table_name, seal, table_name
from ..runtime.request import Asked
from ..runtime.sampler import OnnxSampler
from ..runtime.step_table import StepTable
from ..table_scheduler import StepTableScheduler
from .compile import compile_scheduler, make_scheduler, split_options
from .parity import ParityReport, compare, compare_sampler
from .precision import reduce_precision
from .sampler_graph import build_sampler

FILES = {"unet.onnx", "step_table.json", "bundle.json", "sampler.onnx"}
OPSET = 20


def is_own(name: str) -> bool:
    """Tell whether `export_bundle` writes a file of this name."""
    return name in FILES or is_table_name(name)


# Scheduler, steps and options by default, chosen by the measurements of ddpm-compare and ddpm-evaluate
DEFAULT_STEPS = 50
DEFAULT_OF_POINTS: tuple[str, int, dict[str, Any]] = "ddim", DEFAULT_STEPS, {}
DEFAULT_OF_IMAGES: tuple[str, int, dict[str, Any]] = "dpmsolver_multistep", 20, {"algorithm_type": "sde-dpmsolver++"}
# A sampler diverges if more than MAX_STRAYS of its samples exceed STRAY_LIMIT times the data's range.
STRAY_POINTS, STRAY_IMAGES, STRAY_LIMIT, MAX_STRAYS = 512, 16, 2.0, 0.01


@dataclasses.dataclass
class ExportReport:
    """The checks of an exported bundle.

    Attributes:
        parity: comparison with the torch pipeline.
        strays: share of test samples far outside the data's range. Solvers without clipping produce a few.
        precision_error: error of the fp16 or int8 network's outputs: see `reduce_precision`.
        sampler_difference: largest difference between `sampler.onnx` and the runtime: see `compare_sampler`.
        warning: why DDPM replaces the default scheduler.
    """

    parity: ParityReport
    strays: float
    precision_error: float | None = None
    sampler_difference: float | None = None
    warning: str | None = None

    def __str__(self) -> str:
        rows = [str(self.parity)]
        if self.strays:
            rows.append(f"{self.strays:.1%} of the samples exceed {STRAY_LIMIT:g} times the data's range")
        if self.precision_error is not None:
            rows.append(f"relative RMS error of the network's outputs in fewer bits: {self.precision_error:.1e}")
        if self.sampler_difference is not None:
            rows.append(f"largest difference between sampler.onnx and the runtime: {self.sampler_difference:.1e}")
        if self.warning is not None:
            rows.append(f"warning: {self.warning}")
        return "\n".join(rows)


def export_bundle(
    checkpoint: str | os.PathLike[str],
    bundle: str | os.PathLike[str],
    scheduler: str | None = None,
    num_inference_steps: int | None = None,
    tolerance: float = 1e-4,
    sampler: str | None = None,
    precision: str = "fp32",
    scheduler_options: dict[str, Any] | None = None,
    table: StepTable | None = None,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    null_label: int | None = None,
    sampler_takes_known: bool = False,
    overwrite: bool = False,
) -> ExportReport:
    """Export a checkpoint as a bundle folder. Compare the bundle with the pipeline before it is moved into place.

    Args:
        checkpoint: a folder that `DDPMMLPPipeline.from_pretrained` loads.
        bundle: the folder to write.
        scheduler: a key of `SCHEDULERS`. By default the checkpoint's own fitted tables, if it has any: its first, or
            that of `num_inference_steps` calls, as the default, and the others as nested tables. Else DDIM for
            points, which clips its predictions to the data's range, so that no point strays; for images DPM-Solver++
            for the reverse SDE (Lu et al. 2022, https://arxiv.org/abs/2211.01095), which is closest to the data after
            the fewest steps. Where that default diverges, as it does on a network that is hardly trained, DDPM takes
            its place, and the report says so.
        num_inference_steps: number of sampling steps; by default those of the first fitted table; else 50, or 20 of
            the images' default scheduler, and never more than the network was trained with.
        tolerance: the largest difference of a final sample between bundle and pipeline, in the network's units
            (where the data have a standard deviation, or for images a range, of about 1), unless every single step
            agrees up to rounding: see `ParityReport`.
        sampler: whether the bundle also gets `sampler.onnx`, the whole sampler as one graph, and which samples that
            has: `"float32"`, or for images `"uint8"`.
        precision: of the network, `"fp32"`, `"fp16"` or `"int8"`: see `reduce_precision`. It is reduced after the
            comparison.
        scheduler_options: of the stock scheduler's own, where they are to differ from those of training, or of its
            steps, such as `eta`.
        table: the steps of the checkpoint's own scheduler, where they need not be compiled; in place of `scheduler`
            and its options. The bundle is compared with the pipeline as always.
        guidance_scale: w of classifier-free guidance, which the bundle's samples have unless one asks for another.
        guidance_interval: `(t_high, t_low)`, the timesteps to guide at; by default all.
        null_label: the class that a stock `UNet2DModel` was trained to take for "no label".
        sampler_takes_known: whether `sampler.onnx` takes known values, which costs it a second noise in each step.
        overwrite: whether a bundle that is there already is replaced; a folder of anything else never is.

    Returns:
        What the comparison found.

    Raises:
        CheckpointError: if the checkpoint can't be loaded.
        ConfigurationError, UnsupportedSchedulerError: if the scheduler can't be compiled, or the network can't be
            guided.
        OutputExistsError: if `bundle` exists, and isn't to be overwritten or holds something else.
        ParityError: if bundle and pipeline differ by more than rounding explains; none is written then.
        DivergenceError: if the sampler diverges: more than one sample in a hundred is far outside of the data's range.
    """
    if precision not in ("fp32", "fp16", "int8"):
        raise ConfigurationError(f"precision must be fp32, fp16 or int8, got {precision!r}")
    scheduler_options = scheduler_options or {}
    if table is not None and (scheduler is not None or scheduler_options):
        raise ConfigurationError("table is for the checkpoint's own scheduler: omit scheduler and scheduler_options")
    bundle, checkpoint = Path(bundle), Path(checkpoint)
    check_folder(bundle, is_own, overwrite)
    pipeline = load_checkpoint(checkpoint)
    set_null_label(pipeline, null_label)
    if guidance_interval is not None and guidance_scale is None:
        raise ConfigurationError("guidance_interval needs a guidance_scale")
    if guidance_scale not in (None, 1) and pipeline.num_classes and pipeline.null_label is None:
        raise ConfigurationError("guidance_scale needs a network with a null label (--null_label)")
    data_range = pipeline.scheduler.config.get("clip_sample_range") or 1.0  # in the network's units
    default_steps, named_steps = DEFAULT_STEPS, num_inference_steps
    has_tables = isinstance(pipeline.scheduler, StepTableScheduler)
    nested: list[StepTable] = []
    if has_tables and table is None and scheduler is None and not scheduler_options:
        table = compile_scheduler(
            pipeline.scheduler, num_inference_steps or pipeline.scheduler.default_num_inference_steps
        )
        others = sorted(set(pipeline.scheduler.tables) - {len(table)}, reverse=True)
        nested = [compile_scheduler(pipeline.scheduler, num_calls) for num_calls in others]
    trained_with, is_default = pipeline.scheduler, scheduler is None and not scheduler_options and table is None
    if table is not None:
        steps = num_inference_steps or len(table)
    else:
        default_steps = DEFAULT_STEPS
        if scheduler is None:
            scheduler, default_steps, default_options = DEFAULT_OF_POINTS if pipeline.is_points else DEFAULT_OF_IMAGES
            scheduler_options = default_options | scheduler_options
        default_steps = min(default_steps, trained_with.config.num_train_timesteps)
        steps = default_steps if num_inference_steps is None else num_inference_steps
        table = _set_scheduler(pipeline, scheduler, scheduler_options, steps)

    if guidance_scale is not None:
        table = table.guided(guidance_scale, guidance_interval)
        nested = [other.guided(guidance_scale, guidance_interval) for other in nested]
    with whole_folder(bundle, is_own, overwrite) as folder:
        export_network(pipeline, folder / "unet.onnx")
        _write_table(folder, table, _describe(pipeline, checkpoint, steps, precision), nested)
        strays, warning = _strays(folder, data_range), None
        if strays > MAX_STRAYS and is_default:
            warning = f"the default {_divergence(table, strays)}"
            table, steps = _fall_back_to_ddpm(pipeline, trained_with, named_steps)
            warning += f"; the bundle uses ddpm with {steps} steps instead: train the network for longer"
            if guidance_scale is not None:
                table = table.guided(guidance_scale, guidance_interval)
            if table.log_variance is not None:  # the network's output has another shape then
                export_network(pipeline, folder / "unet.onnx")
            _write_table(folder, table, _describe(pipeline, checkpoint, steps, precision))
            strays = _strays(folder, data_range)
        _check_strays(table, strays)
        parities = [
            compare(pipeline, folder, num_calls, tolerance, guidance_scale, guidance_interval)
            for num_calls in (*map(len, nested), steps)
        ]
        for num_calls, parity in zip((*map(len, nested), steps), parities, strict=True):
            if not parity.ok:
                message = f"the bundle differs from the pipeline by more than {tolerance:g}, so it is not written"
                message += f" (with its table of {num_calls} calls)" if nested else ""
                raise ParityError(f"{message}: {parity.explanation}", parity)
        parity = parities[-1]  # of the default table
        report = ExportReport(parity, strays, warning=warning)
        if precision != "fp32":
            report.precision_error = reduce_precision(folder, precision)
            report.strays = _strays(folder, data_range)
            _check_strays(table, report.strays)
        if sampler is not None:
            onnx.save(build_sampler(folder, sampler, sampler_takes_known), folder / "sampler.onnx")
            report.sampler_difference = compare_sampler(folder)
            # int8's rounding turns the smallest difference into one of a whole level.
            allowed = math.inf if precision == "int8" else max(tolerance, *parity.amplifications.values())
            if not report.sampler_difference <= allowed:
                message = f"sampler.onnx differs from the runtime by {report.sampler_difference:.1e}"
                raise ParityError(f"{message}, so the bundle is not written", report)
        seal(folder)
    return report


def set_null_label(pipeline: DDPMMLPPipeline, null_label: int | None) -> None:
    """Let a pipeline take a class of its stock network for "no label", if there is to be one.

    Raises:
        ConfigurationError: if the network knows no such class.
    """
    if null_label is None:
        return
    if not pipeline.num_classes:
        raise ConfigurationError("null_label is for a network that knows classes, and this one knows none")
    if not 0 <= null_label < pipeline.num_classes:
        raise ConfigurationError(f"null_label must be one of the network's {pipeline.num_classes} labels")
    pipeline.register_to_config(null_label=null_label)


def _set_scheduler(
    pipeline: DDPMMLPPipeline, name: str, options: dict[str, Any], num_inference_steps: int
) -> StepTable:
    """Replace the pipeline's scheduler; return the new one's table."""
    own_options, step_options = split_options(name, options)
    pipeline.scheduler = make_scheduler(name, pipeline.scheduler, **own_options)
    table = compile_scheduler(pipeline.scheduler, num_inference_steps, **step_options)
    pipeline.scheduler.step = functools.partial(pipeline.scheduler.step, **step_options)
    return table


def _fall_back_to_ddpm(
    pipeline: DDPMMLPPipeline, trained_with: SchedulerMixin, num_inference_steps: int | None
) -> tuple[StepTable, int]:
    """Give the pipeline a DDPM scheduler in place of a default that diverges; return its table and number of steps."""
    steps = num_inference_steps or min(DEFAULT_STEPS, trained_with.config.num_train_timesteps)
    pipeline.scheduler = trained_with
    return _set_scheduler(pipeline, "ddpm", {}, steps), steps


def _write_table(folder: Path, table: StepTable, info: dict[str, Any], nested: Sequence[StepTable] = ()) -> None:
    table.save(folder / "step_table.json")
    for other in nested:
        other.save(folder / table_name(len(other)))
    if nested:
        info = info | {"nested_tables": [len(other) for other in nested]}
    (folder / "bundle.json").write_text(json.dumps(info), encoding="utf-8")


def _strays(bundle: Path, data_range: float) -> float:
    """Return the share of a bundle's samples with a value far outside the data's range."""
    sampler = OnnxSampler(bundle)
    number = STRAY_POINTS if sampler.is_points else STRAY_IMAGES
    asked: Asked = {}
    if sampler.class_names and sampler.info["null_label"] is None:  # the network needs a label
        asked["class_labels"] = [i % len(sampler.class_names) for i in range(number)]
    (last,) = deque(sampler.steps(number, **asked), maxlen=1)
    largest = np.abs(last.sample).reshape(len(last.sample), -1).max(axis=1)
    return float((~(largest <= STRAY_LIMIT * data_range)).mean())  # counts NaN


def _check_strays(table: StepTable, strays: float) -> None:
    if strays > MAX_STRAYS:
        hint = "train the network for longer" if table.clip_range else "use ddpm or ddim with clip_sample=true"
        raise DivergenceError(f"{_divergence(table, strays)}, so the bundle is not written: {hint}")


def _divergence(table: StepTable, strays: float) -> str:
    return (
        f"{table.scheduler} with {len(table)} network evaluations diverges: {strays:.0%} of its samples exceed "
        f"{STRAY_LIMIT:g} times the data's range"
    )


def export_network(pipeline: DDPMMLPPipeline, path: Path) -> None:
    """Write a pipeline's network as ONNX.

    Its inputs are `sample` `[batch, *sample_shape]`, `timestep` `[]`, and where it takes them `class_labels` int64
    `[batch]` and `condition` `[batch, condition_dim]`; its output is `out_sample`.

    The timestep is one number, not one for each sample: in sampling it is the same for all, and its embedding is then
    computed once. A variance that the network predicts is left out unless the pipeline's scheduler takes it.
    """
    inputs = input_names(pipeline)

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = pipeline.unet

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, *further: torch.Tensor) -> torch.Tensor:
            known = dict(zip(inputs[len(INPUTS) :], further, strict=True))
            output = self.unet(sample, timestep, return_dict=False, **known)[0]
            return output if pipeline.learns_variance else output[:, : sample.shape[1]]

    further = {
        "class_labels": torch.zeros(2, dtype=torch.int64),
        "condition": torch.zeros(2, pipeline.unet.config.get("condition_dim") or 0),
    }
    chosen = [further[name] for name in inputs[len(INPUTS) :]]
    example = (torch.zeros(2, *pipeline.sample_shape), torch.tensor(1.0), *chosen)
    batch = torch.export.Dim("batch")
    with quiet():
        program = torch.onnx.export(
            Network().eval(),
            example,
            input_names=inputs,
            output_names=["out_sample"],
            dynamic_shapes=({0: batch}, {}, *([tuple({0: batch} for _ in chosen)] if chosen else [])),
            opset_version=OPSET,
            custom_translation_table={torch.ops.aten.group_norm.default: _group_norm},
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # `None` comes from the older exporter only
    model = program.model_proto
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        del node.metadata_props[:]  # they name source files of this machine
    for kind in ("Sin", "Cos"):  # by name, the page keeps them on the CPU: GPUs compute them to three digits
        for i, node in enumerate(node for node in model.graph.node if node.op_type == kind):
            node.name = f"{kind.lower()}_{i}"
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def input_names(pipeline: DDPMMLPPipeline) -> list[str]:
    """Return the names of the inputs that a pipeline's network has as ONNX."""
    takes = {
        "class_labels": pipeline.num_classes,
        "condition": pipeline.condition_columns or pipeline.takes_known,
    }
    return [*INPUTS, *(name for name in OPTIONAL_INPUTS if takes[name])]


def _group_norm(x, num_groups, weight, bias, eps=1e-5, cudnn_enabled=True):  # type: ignore[no-untyped-def]  # the exporter reads annotations as ONNX types
    """Group norm (Wu & He 2018, https://arxiv.org/abs/1803.08494) of `[batch, channels, *size]` in four nodes.

    The exporter's own translation computes shapes at run time, and scales and shifts in separate nodes. For small
    samples, these nodes cost more than their arithmetic.
    """
    channels, *size = x.shape[1:]
    groups = op.Reshape(x, op.Constant(value_ints=[0, num_groups, -1]))
    normalized = op.InstanceNormalization(groups, _filled(num_groups, 1), _filled(num_groups, 0), epsilon=eps)
    normalized = op.Reshape(normalized, op.Constant(value_ints=[0, channels, *size]))
    # With mean 0 and variance 1, batch norm reduces to scale and shift.
    return op.BatchNormalization(normalized, weight, bias, _filled(channels, 0), _filled(channels, 1), epsilon=0.0)


def _filled(size: int, value: float) -> Any:
    return op.Constant(value=onnx.numpy_helper.from_array(np.full(size, value, dtype=np.float32)))


def _describe(pipeline: DDPMMLPPipeline, checkpoint: Path, num_inference_steps: int, precision: str) -> dict[str, Any]:
    """Return the content of bundle.json."""
    shape, config = pipeline.sample_shape, pipeline.config
    inputs = input_names(pipeline)
    info: dict[str, Any] = {"format": FORMAT, "version": VERSION, "inputs": inputs, "sample_shape": list(shape)}
    if pipeline.is_points:
        info["data_mean"] = config.data_mean or [0.0] * shape[0]
        info["data_std"] = config.data_std or [1.0] * shape[0]
        info["data_columns"] = pipeline.data_columns
        if config.columns is not None:
            info["columns"] = config.columns
    else:
        info["value_range"] = [-1.0, 1.0]
    if "class_labels" in inputs:
        info |= {"class_names": pipeline.class_names, "null_label": pipeline.null_label}
        if config.class_shares is not None:
            info["class_shares"] = config.class_shares
    if pipeline.takes_known:
        info["condition_is_known"] = True
    elif "condition" in inputs:
        columns = pipeline.condition_columns
        info["condition_mean"] = config.condition_mean or [0.0] * len(columns)
        info["condition_std"] = config.condition_std or [1.0] * len(columns)
        info["condition_columns"] = columns
    info["provenance"] = {
        "checkpoint": checkpoint.resolve().name,
        "unet": type(pipeline.unet).__name__,
        "num_parameters": pipeline.unet.num_parameters(),
        "precision": precision,
        "scheduler": type(pipeline.scheduler).__name__,
        "num_inference_steps": num_inference_steps,
        "exported_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "ddpm-mlp-pipeline": ddpm_mlp_pipeline.__version__,
            "diffusers": diffusers.__version__,
            "onnx": onnx.__version__,
            "torch": torch.__version__,
        },
    }
    return info
