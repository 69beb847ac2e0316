"""Reduce the precision of a bundle's network: `fp16` halves the file, `int8` also runs faster on CPUs with VNNI."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from ..errors import ConfigurationError
from ..runtime.request import resolve
from ..runtime.sampler import OnnxSampler

CALIBRATION_SAMPLES, CALIBRATION_STEPS = 16, 25
MIN_SIZE = 1024  # smaller tensors, such as the timestep embedding's frequencies, stay in float32


def reduce_precision(bundle: str | os.PathLike[str], precision: str) -> float:
    """Reduce the precision of a bundle's network, and replace its `unet.onnx`.

    `fp16` stores the weights in half precision. ONNX Runtime converts them to float32 when it loads them, so sampling
    takes as long as before, and samples change by the weights' rounding only. `int8` quantizes the convolutions'
    weights and inputs with ONNX Runtime's quantizer, calibrated on the bundle's own sampling trajectory.

    Args:
        bundle: a bundle folder.
        precision: `"fp16"` or `"int8"`.

    Returns:
        The root mean square error of the network's outputs along that trajectory, relative to their root mean square.

    Raises:
        ConfigurationError: if `precision` is `"int8"` and the network has no convolutions.
    """
    sampler = OnnxSampler(bundle)
    path = Path(bundle) / "unet.onnx"
    feeds = list(_trajectory(sampler))
    expected = _outputs(path, feeds)
    if precision == "fp16":
        _halve(path)
    elif any(node.op_type == "Conv" for node in onnx.load(path).graph.node):
        _quantize(path, feeds)
    else:
        raise ConfigurationError("int8 is for convolutions, and this network has none: use fp32 or fp16")
    error = _outputs(path, feeds) - expected
    return float(np.sqrt((error**2).mean() / (expected**2).mean()))


def _outputs(path: Path, feeds: list[dict[str, np.ndarray]]) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.stack([session.run(["out_sample"], feed)[0] for feed in feeds])


def _trajectory(sampler: OnnxSampler) -> Iterator[dict[str, np.ndarray]]:
    """Yield the network's inputs along a sampling trajectory of seed 0, where nothing is asked."""
    every = max(1, len(sampler) // CALIBRATION_STEPS)
    request, _ = resolve(sampler.info, sampler.table, range(CALIBRATION_SAMPLES))
    inputs = request.of(range(CALIBRATION_SAMPLES), seed=0).inputs
    x = sampler.first_input(CALIBRATION_SAMPLES)
    for step in sampler.steps(CALIBRATION_SAMPLES):
        if step.index % every == 0:
            yield {"sample": x, "timestep": np.array(step.timestep, dtype=np.float32), **inputs}
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
    # VNNI instructions multiply unsigned with signed numbers: signed inputs (S8S8) are slower than float32.
    # Transposed convolutions have no 8-bit kernel and stay in float32.
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
