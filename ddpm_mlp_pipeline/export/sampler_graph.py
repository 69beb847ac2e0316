"""`build_sampler`: build one ONNX graph from a bundle's network, table and noise, for any ONNX Runtime.

The graph does the same as `OnnxSampler`: it draws the initial sample, and a `Loop` over the table's rows evaluates the
network and takes the steps; a single row needs no loop. ONNX's random operators take no seed at run time, so the graph
contains Philox, with its 32-bit words in uint64 tensors, as in noise.py. Values that depend on the timestep alone are
precomputed as tables.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass
from onnxscript import GraphBuilder, OpBuilder

from ..errors import ConfigurationError
from ..runtime.bundle import OPTIONAL_INPUTS
from ..runtime.noise import KEY_INCREMENTS, MULTIPLIERS, ROUNDS
from ..runtime.sampler import NOISE_CHUNK, OnnxSampler
from ..runtime.step_table import EPS, X_0, StepTable, X, Z

Values = Sequence[ir.Value]


def build_sampler(
    bundle: str | os.PathLike[str], dtype: str = "float32", takes_known: bool = False
) -> onnx.ModelProto:
    """Build the whole sampler of a bundle.

    Args:
        bundle: a folder with `unet.onnx`, `step_table.json` and `bundle.json`.
        dtype: of the samples: `"float32"`, or `"uint8"` for images.
        takes_known: whether the graph takes known values.

    Returns:
        A model with the inputs `seed` and `num_samples`, int64 `[]`, and the output `samples`: points in the data's
        units, `[num_samples, dimension]`, or images, `[num_samples, height, width, channels]`, in [0, 1] or 0 to 255.
        The samples are those of `OnnxSampler` for the same seed, up to the rounding of float32.

        Where the network takes them, it also has the inputs `class_labels`, int64 `[num_samples]`, with the null label
        for none; `condition`, float32 `[num_samples, condition_dim]`, in its own units, with NaN for none; and
        `guidance_scale`, float32 `[]`, which replaces the table's in its guided steps (or in all, if none is guided);
        a table with several scales keeps them. With `takes_known`, it has `known` and `mask`, float32 of the shape of
        `samples`, with a mask of 1 where `known` is known and 0 elsewhere.

    Raises:
        BundleError: if the bundle can't be loaded.
        ConfigurationError: if points are to be uint8, or the table takes no known values.
    """
    sampler = OnnxSampler(bundle)
    table, shape, info = sampler.table, sampler.sample_shape, sampler.info
    if dtype not in ("float32", "uint8") or (dtype == "uint8" and sampler.is_points):
        raise ConfigurationError(f"samples can be float32, or for images uint8, not {dtype}")
    if takes_known and table.alphas_cumprod is None:
        raise ConfigurationError("this bundle's step table takes no known values: export the checkpoint again")
    path = sampler.folder / "unet.onnx"
    network = ir.load(path)
    graph = ir.Graph([], [], nodes=[], opset_imports=network.graph.opset_imports, name="sampler")
    builder = GraphBuilder(graph)
    op = builder.op
    seed, num_samples = (builder.input(name, ir.DataType.INT64, []) for name in ("seed", "num_samples"))
    further, null = _further_inputs(builder, info)
    is_guidable = bool(null) or (takes_known and info["condition_is_known"])
    guidance = _guidance(builder, table) if is_guidable else None
    noise = _Noise(op, seed, num_samples, math.prod(shape))
    batch_shape = op.Concat(op.Reshape(num_samples, [-1]), [*shape], axis=0)
    known = _known_inputs(builder, info) if takes_known else None
    x = op.Mul(op.Reshape(noise(op, 0, 1), batch_shape), table.initial_scale)  # draw 0 is the initial sample
    x.shape = ir.Shape(["num_samples", *shape])
    if info["condition_is_known"]:
        unknown = op.Add(op.Mul(x, 0.0), op.Constant(value_float=math.nan))
        further["condition"] = unknown if known is None else op.Where(known[1], known[0], unknown)
        if is_guidable:
            null["condition"] = unknown

    def replace_known(op: OpBuilder, k: ir.Value, x: ir.Value) -> ir.Value:
        if known is None or table.alphas_cumprod is None:
            return x
        y, mask = known
        alphas_cumprod = np.append(table.alphas_cumprod[1:], 1.0)
        signal, sigma = (op.Gather(_table(op, np.sqrt(row)), k) for row in (alphas_cumprod, 1 - alphas_cumprod))
        z = op.Reshape(noise(op, k, 1, stream=1), batch_shape)
        return op.Where(mask, op.Add(op.Mul(signal, y), op.Mul(sigma, z)), x)

    step = _Step(table, network, _after_timestep(path, table.timesteps), further, null, guidance, replace_known)
    state = [x, *(op.Mul(x, 0.0) for _ in step.past)]  # zeros, where there is no past
    calls = op.Constant(value_int=len(table))
    if len(table) == 1 and not table.is_stochastic.any():
        x, *_ = step(op, op.Constant(value_int=0), *state)
    elif not table.is_stochastic.any():
        x, *_ = _loop(op, calls, state, step)
    else:
        # Draw noise for many steps at once: for small samples, that takes no longer than for one.
        chunk = op.Div(NOISE_CHUNK, op.Mul(num_samples, math.prod(shape)))
        chunk = op.Min(op.Max(chunk, 1), calls)

        def take_steps(op: OpBuilder, j: ir.Value, *state: ir.Value) -> Values:
            first = op.Mul(j, chunk)
            number = op.Min(chunk, op.Sub(calls, first))
            z = op.Reshape(noise(op, op.Add(first, 1), number), op.Concat([-1], batch_shape, axis=0))
            return _loop(
                op, number, state, lambda op, i, *state: step(op, op.Add(first, i), *state, z=op.Gather(z, i))
            )

        x, *_ = _loop(op, op.Div(op.Sub(op.Add(calls, chunk), 1), chunk), state, take_steps)

    if sampler.is_points:
        mean, std = ([float(number) for number in sampler.info[name]] for name in ("data_mean", "data_std"))
        samples = op.Add(op.Mul(x, std), mean)
    else:
        samples = op.Transpose(op.Clip(op.Add(op.Mul(x, 0.5), 0.5), 0.0, 1.0), perm=[0, 2, 3, 1])
        if dtype == "uint8":
            samples = op.Cast(op.Round(op.Mul(samples, 255.0)), to=ir.DataType.UINT8)
    builder.add_output(samples, "samples")
    model = ir.Model(graph, ir_version=network.ir_version, producer_name="ddpm-mlp-pipeline")
    RemoveUnusedNodesPass()(model)  # a single row leaves some
    NameFixPass()(model)  # names of the network and of the sampler may collide
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _further_inputs(builder: GraphBuilder, info: dict[str, Any]) -> tuple[dict[str, ir.Value], dict[str, ir.Value]]:
    """What the network is told beside x_t and t, and what of it stands for nothing, for guidance; empty if there is
    no such thing."""
    op, inputs, null = builder.op, {}, {}
    if "class_labels" in info["inputs"]:
        labels = builder.input("class_labels", ir.DataType.INT64, ["num_samples"])
        inputs["class_labels"] = labels
        if info["null_label"] is None:
            return inputs, {}
        null["class_labels"] = op.Add(op.Mul(labels, 0), info["null_label"])
    if "condition" in info["inputs"] and not info["condition_is_known"]:
        mean, std = ([float(number) for number in info[f"condition_{name}"]] for name in ("mean", "std"))
        given = builder.input("condition", ir.DataType.FLOAT, ["num_samples", len(mean)])
        inputs["condition"] = op.Div(op.Sub(given, mean), std)
        null["condition"] = op.Add(op.Mul(given, 0.0), op.Constant(value_float=math.nan))
    return inputs, null


def _guidance(builder: GraphBuilder, table: StepTable) -> ir.Value:
    """Return each call's scale, float32 `[calls]`: from the input `guidance_scale`, unless the table has several."""
    op, is_guided, scales = builder.op, table.is_guided, table.guidance_scales
    if is_guided.any() and len(set(scales[is_guided])) > 1:
        return _table(op, scales)
    scale = builder.input("guidance_scale", ir.DataType.FLOAT, [])
    share = _table(op, np.where(is_guided | ~is_guided.any(), 1.0, 0.0))
    return op.Add(op.Mul(share, scale), op.Sub(1.0, share))


def _known_inputs(builder: GraphBuilder, info: dict[str, Any]) -> tuple[ir.Value, ir.Value]:
    """Return y in the network's units and m as booleans, `[num_samples, *sample_shape]`."""
    op, shape = builder.op, info["sample_shape"]
    is_points = len(shape) == 1
    size = ["num_samples", *(shape if is_points else [*shape[1:], shape[0]])]
    known, mask = (builder.input(name, ir.DataType.FLOAT, size) for name in ("known", "mask"))
    mask = op.Greater(mask, 0.5)
    if is_points:
        mean, std = ([float(number) for number in info[name]] for name in ("data_mean", "data_std"))
        return op.Div(op.Sub(known, mean), std), mask
    known, mask = (op.Transpose(values, perm=[0, 3, 1, 2]) for values in (known, mask))
    return op.Sub(op.Mul(known, 2.0), 1.0), mask


def _loop(op: OpBuilder, trip_count: ir.Value, state: Values, body: Callable[..., Values]) -> Values:
    """Repeat `state = body(op, i, *state)` for i = 0 … trip_count − 1; return the last state."""
    inputs = [ir.val("i", ir.DataType.INT64, []), ir.val("go_on", ir.DataType.BOOL, [])]
    inputs += [ir.val(f"before_{j}", value.dtype, value.shape) for j, value in enumerate(state)]
    outputs = [ir.val("goes_on", ir.DataType.BOOL, [])]
    outputs += [ir.val(f"after_{j}", value.dtype, value.shape) for j, value in enumerate(state)]
    graph = op.builder.subgraph(
        lambda op, i, go_on, *state: [op.Identity(go_on), *body(op, i, *state)], inputs, outputs, name="body"
    )
    after = op.Loop(trip_count, None, *state, body=graph, _outputs=len(state))
    after = [after] if len(state) == 1 else list(after)
    for value, before in zip(after, state, strict=True):
        value.dtype, value.shape = before.dtype, before.shape
    return after


class _Noise:
    """Draw standard normals as `noise.normal` does."""

    def __init__(self, op: OpBuilder, seed: ir.Value, num_samples: ir.Value, dimension: int):
        self.dimension, self.num_samples = dimension, num_samples
        index = op.Range(0, num_samples, 1)
        self.index = op.Unsqueeze(op.Cast(index, to=ir.DataType.UINT64), [1])
        seed = op.Cast(seed, to=ir.DataType.UINT64)
        self.keys = [(_low(op, seed), _high(op, seed))]  # one for each round
        for _ in range(ROUNDS - 1):
            key = zip(self.keys[-1], KEY_INCREMENTS, strict=True)
            self.keys.append(tuple(_low(op, op.Add(word, int(increment))) for word, increment in key))

    def __call__(self, op: OpBuilder, first: ir.Value | int, number: ir.Value | int, stream: int = 0) -> ir.Value:
        """Return some of the draws of a stream, `[number, num_samples, dimension]`."""
        start = op.Mul(first, op.Constant(value_int=self.dimension))
        stop = op.Add(start, op.Mul(number, self.dimension))
        blocks = op.Range(op.Div(start, 4), op.Div(op.Add(stop, 3), 4), 1)
        words = self._philox(op, op.Unsqueeze(op.Cast(blocks, to=ir.DataType.UINT64), [0]), stream)
        normals = [normal for pair in (words[:2], words[2:]) for normal in _box_muller(op, *pair)]
        stream = op.Concat(*(op.Unsqueeze(normal, [-1]) for normal in normals), axis=-1)
        stream = op.Reshape(stream, op.Concat(op.Reshape(self.num_samples, [-1]), [-1], axis=0))
        skipped = op.Reshape(op.Mod(start, 4), [-1])
        stream = op.Slice(stream, skipped, op.Add(skipped, op.Reshape(op.Sub(stop, start), [-1])), [1])
        shape = op.Concat(op.Reshape(self.num_samples, [-1]), [-1, self.dimension], axis=0)
        return op.Transpose(op.Reshape(stream, shape), perm=[1, 0, 2])

    def _philox(self, op: OpBuilder, blocks: ir.Value, stream: int) -> Values:
        """Philox-4×32-10 of the counters (block, index of the sample, stream, 0): four words, `[num_samples,
        blocks]`."""
        c0, c1, c2, c3 = blocks, self.index, op.CastLike(stream, self.index), op.CastLike(0, self.index)
        for k0, k1 in self.keys:
            p0, p1 = op.Mul(c0, int(MULTIPLIERS[0])), op.Mul(c2, int(MULTIPLIERS[1]))
            c0, c2 = (op.BitwiseXor(op.BitwiseXor(_high(op, p), c), k) for p, c, k in ((p1, c1, k0), (p0, c3, k1)))
            c1, c3 = _low(op, p1), _low(op, p0)
        return c0, c1, c2, c3


def _low(op: OpBuilder, words: ir.Value) -> ir.Value:
    return op.BitwiseAnd(words, 0xFFFFFFFF)


def _high(op: OpBuilder, words: ir.Value) -> ir.Value:
    return op.BitShift(words, 32, direction="RIGHT")


def _box_muller(op: OpBuilder, a: ir.Value, b: ir.Value) -> Values:
    """Turn two 32-bit words into two standard normals, as `noise._box_muller` does."""
    a, b = (op.BitShift(word, 8, direction="RIGHT") for word in (a, b))
    u = op.Mul(op.Cast(op.Add(a, 1), to=ir.DataType.FLOAT), 2.0**-24)
    angle = op.Mul(op.Cast(b, to=ir.DataType.FLOAT), 2.0**-24 * 2 * math.pi)
    radius = op.Sqrt(op.Mul(op.Log(u), -2.0))
    return op.Mul(radius, op.Cos(angle)), op.Mul(radius, op.Sin(angle))


class _Step:
    """A step of the table, the loop's body. The loop carries the earlier values that a row uses, `past`."""

    def __init__(
        self,
        table: StepTable,
        network: ir.Model,
        after_timestep: dict[str, np.ndarray],
        further: dict[str, ir.Value],
        null: dict[str, ir.Value],
        guidance: ir.Value | None,
        replace_known: Callable[[OpBuilder, ir.Value, ir.Value], ir.Value],
    ):
        self.table, self.network, self.after_timestep = table, network, after_timestep
        self.further, self.null, self.guidance, self.replace_known = further, null, guidance, replace_known
        lags = {term: max(i for i, other in table.terms if other == term) for _, term in table.terms}
        self.past = [(i, term) for term, lag in lags.items() for i in range(1, lag + 1)]

    def __call__(self, op: OpBuilder, k: ir.Value, x: ir.Value, *past: ir.Value, z: ir.Value | None = None) -> Values:
        table = self.table
        values = dict(zip(self.past, past, strict=True))
        eps = self._predict(op, k, x)
        if table.log_variance is not None:
            eps, v = op.Split(eps, num_outputs=2, axis=1, _outputs=2)
            if z is not None:
                a, b = op.Split(op.Gather(_table(op, table.log_variance / 2), k), num_outputs=2, _outputs=2)
                z = op.Mul(z, op.Exp(op.Add(op.Mul(v, a), b)))
        values[0, X], values[0, EPS], values[0, Z] = x, eps, z
        if table.clip_range is not None:
            x_0 = self._sum(op, k, table.to_x_0, [x, values[0, EPS]])
            values[0, X_0] = op.Clip(x_0, -table.clip_range, table.clip_range)
        coefficients = np.stack([table.to_next[:, i, term] for i, term in table.terms], axis=1)
        x_next = self.replace_known(op, k, self._sum(op, k, coefficients, [values[p] for p in table.terms]))
        # An output can't be an input as it is.
        return x_next, *(op.Identity(values[i - 1, term]) for i, term in self.past)

    def _sum(self, op: OpBuilder, k: ir.Value, coefficients: np.ndarray, values: Values) -> ir.Value:
        row = op.Gather(_table(op, coefficients), k)
        row = op.Split(row, num_outputs=len(values), _outputs=len(values)) if len(values) > 1 else [row]
        terms = [op.Mul(value, coefficient) for value, coefficient in zip(values, row, strict=True)]
        return functools.reduce(op.Add, terms)

    def _predict(self, op: OpBuilder, k: ir.Value, x: ir.Value) -> ir.Value:
        """Call the network, where the call is guided with both halves in one batch."""
        if self.guidance is None:
            return self._call_network(op, k, x, self.further)
        w = op.Gather(self.guidance, k)
        one = op.Constant(value_ints=[1])
        number = op.Slice(op.Shape(x), [0], [1])
        halves = op.Add(one, op.Cast(op.Reshape(op.Not(op.Equal(w, 1.0)), [1]), to=ir.DataType.INT64))
        batch = op.Mul(number, halves)

        def first(values: ir.Value, null: ir.Value) -> ir.Value:
            return op.Slice(op.Concat(values, null, axis=0), [0], batch, [0])

        inputs = {name: first(values, self.null[name]) for name, values in self.further.items()}
        output = self._call_network(op, k, first(x, x), inputs)
        conditional = op.Slice(output, [0], number, [0])
        null = op.Slice(output, op.Sub(batch, number), batch, [0])
        # Where w is 1, both are the same.
        guided = op.Add(op.Mul(conditional, w), op.Mul(null, op.Sub(1.0, w)))
        if self.table.log_variance is None:
            return guided
        eps, _ = op.Split(guided, num_outputs=2, axis=1, _outputs=2)
        _, v = op.Split(conditional, num_outputs=2, axis=1, _outputs=2)
        return op.Concat(eps, v, axis=1)

    def _call_network(self, op: OpBuilder, k: ir.Value, x: ir.Value, inputs: dict[str, ir.Value]) -> ir.Value:
        """Move the network into the loop's body."""
        graph = self.network.graph
        values = {value.name: value for node in graph for value in node.outputs} | {v.name: v for v in graph.inputs}
        for name, rows in self.after_timestep.items():
            ir.convenience.replace_all_uses_with(values[name], op.Gather(_table(op, rows), k))
        for name, value in {"sample": x, **inputs}.items():
            ir.convenience.replace_all_uses_with(values[name], value)
        RemoveUnusedNodesPass()(self.network)  # those that led from the timestep there
        # The weights go with it: from outside of a loop's body, ONNX Runtime doesn't arrange them for its kernels.
        for initializer in list(graph.initializers.values()):
            graph.initializers.pop(initializer.name)
            op.builder.graph.register_initializer(initializer)
        for node in list(graph):
            graph.remove(node)
            op.builder.add_node(node)
        return graph.outputs[0]


def _table(op: OpBuilder, rows: np.ndarray) -> ir.Value:
    return op.Constant(value=ir.tensor(rows.astype(np.float32)))


def _after_timestep(path: Path, timesteps: np.ndarray) -> dict[str, np.ndarray]:
    """Precompute the values that depend on the timestep alone and are combined with the sample.

    Returns:
        For each value's name, its values at the timesteps, `[calls, …]`.
    """
    model = onnx.load(path)
    of_timestep, of_sample, met = {"timestep"}, {"sample", *OPTIONAL_INPUTS}, set()
    for node in model.graph.node:
        if of_sample & set(node.input):
            of_sample.update(node.output)
            met |= of_timestep & set(node.input)
        elif of_timestep & set(node.input):
            of_timestep.update(node.output)
    values = {"timestep": timesteps} if "timestep" in met else {}
    names = sorted(met - {"timestep"})
    if names:
        part = onnx.utils.Extractor(model).extract_model(["timestep"], names)
        session = ort.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
        rows = [session.run(names, {"timestep": np.array(t)}) for t in timesteps]
        values |= {name: np.stack(row) for name, row in zip(names, zip(*rows, strict=True), strict=True)}
    return values
