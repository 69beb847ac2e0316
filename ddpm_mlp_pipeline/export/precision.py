"""A bundle's network in fewer bits: `fp16` halves the file, `int8` is faster too, where CPUs have 8-bit products."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from ..errors import ConfigurationError
from ..runtime.sampler import OnnxSampler

CALIBRATION_SAMPLES, CALIBRATION_STEPS = 16, 25
MIN_SIZE = 1024  # of weights worth halving: the frequencies of the timestep's embedding, say, need their digits


def reduce_precision(bundle: str | os.PathLike[str], precision: str) -> float:
    """Replace a bundle's network with one of fewer bits.

    `fp16` keeps the weights in half precision; ONNX Runtime turns them back when it loads them, so that samples take
    as long, and are the same but for the weights' rounding. `int8` quantises the convolutions' weights and inputs, by
    ONNX Runtime's own tool, with the ranges that the inputs have along the bundle's sampling trajectory.

    Returns:
        The root mean square error of the network's outputs along that trajectory, relative to their own.

    Raises:
        ConfigurationError: if a network without convolutions is to be int8.
    """
    sampler = OnnxSampler(bundle)
    path = Path(bundle) / "unet.onnx"
    feeds = list(_trajectory(sampler))
    expected = np.stack([sampler.predict(feed["sample"], feed["timestep"].item()) for feed in feeds])
    if precision == "fp16":
        _halve(path)
    elif any(node.op_type == "Conv" for node in onnx.load(path).graph.node):
        _quantize(path, feeds)
    else:
        raise ConfigurationError("int8 pays for convolutions only, and this network has none")
    reduced = OnnxSampler(bundle)
    error = np.stack([reduced.predict(feed["sample"], feed["timestep"].item()) for feed in feeds]) - expected
    return float(np.sqrt((error**2).mean() / (expected**2).mean()))


def _trajectory(sampler: OnnxSampler) -> Iterator[dict[str, np.ndarray]]:
    """What the network is given on the way from noise to samples."""
    every = max(1, len(sampler) // CALIBRATION_STEPS)
    x = sampler.first_input(CALIBRATION_SAMPLES)
    for step in sampler.steps(CALIBRATION_SAMPLES):
        if step.index % every == 0:
            yield {"sample": x, "timestep": np.array(step.timestep, dtype=np.float32)}
        x = step.sample


def _halve(path: Path) -> None:
    model = ir.load(path)
    for name, value in list(model.graph.initializers.items()):
        if value.dtype == ir.DataType.FLOAT and value.const_value.size >= MIN_SIZE:
            half = ir.tensor(value.const_value.numpy().astype(np.float16), name=f"{name}.half")
            stored = ir.val(half.name, const_value=half)
            cast = ir.node("Cast", [stored], attributes={"to": ir.DataType.FLOAT})
            ir.convenience.replace_all_uses_with(value, cast.outputs[0])
            model.graph.initializers.pop(name)
            model.graph.register_initializer(stored)
            model.graph.insert_before(model.graph[0], cast)
    ir.save(model, path)


def _quantize(path: Path, feeds: list[dict[str, np.ndarray]]) -> None:
    class Reader(CalibrationDataReader):
        remaining = iter(feeds)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.remaining, None)

    quant_pre_process(path, path, skip_symbolic_shape=True)
    # Signed inputs (S8S8) are slower than float32 on CPUs with VNNI instructions, which multiply unsigned with signed.
    # Transposed convolutions, which have no 8-bit kernel, stay as they are.
    quantize_static(
        path,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
