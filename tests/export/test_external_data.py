"""The search of a network's bytes for weights in other files, against onnx's own parser."""

import shutil
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError, Message
from onnx import TensorProto, helper, numpy_helper

from ddpm_mlp_pipeline import OnnxSampler
from ddpm_mlp_pipeline.errors import BundleError
from ddpm_mlp_pipeline.runtime import sampler as runtime
from ddpm_mlp_pipeline.runtime.bundle import seal
from ddpm_mlp_pipeline.runtime.external_data import has_external_data


def tensor(location: str | None = None, name: str = "location") -> TensorProto:
    tensor = numpy_helper.from_array(np.ones(3, dtype=np.float32), name)
    if location is not None:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
    return tensor


def model_with(tensor: TensorProto, place: str) -> onnx.ModelProto:
    """Return a model with the tensor in one of the places where ONNX allows tensors."""
    node = helper.make_node("Constant", [], ["y"], name="location")
    graph = helper.make_graph([node], "location", [], [])
    model = helper.make_model(graph)
    attribute = model.graph.node[0].attribute.add(name="location")
    inner = helper.make_graph([helper.make_node("Constant", [], ["z"], value=tensor)], "inner", [], [])
    if place == "initializer":
        model.graph.initializer.append(tensor)
    elif place in ("sparse values", "sparse indices"):
        sparse = model.graph.sparse_initializer.add()
        (sparse.values if place == "sparse values" else sparse.indices).CopyFrom(tensor)
    elif place == "attribute":
        attribute.t.CopyFrom(tensor)
    elif place == "attribute's list":
        attribute.tensors.append(tensor)
    elif place == "attribute's sparse":
        attribute.sparse_tensor.values.CopyFrom(tensor)
    elif place == "attribute's list of sparse":
        attribute.sparse_tensors.add().indices.CopyFrom(tensor)
    elif place == "subgraph":
        attribute.g.CopyFrom(inner)
    elif place == "subgraph of a subgraph":
        attribute.graphs.add().node.add().attribute.add().g.CopyFrom(inner)
    elif place == "function":
        model.functions.add().node.extend(inner.node)
    elif place == "function's default":
        model.functions.add().attribute_proto.add().t.CopyFrom(tensor)
    elif place == "training":
        model.training_info.add().algorithm.CopyFrom(inner)
    return model


PLACES = [
    *("initializer", "sparse values", "sparse indices", "attribute", "attribute's list", "attribute's sparse"),
    *(
        "attribute's list of sparse",
        "subgraph",
        "subgraph of a subgraph",
        "function",
        "function's default",
        "training",
    ),
]


def tensors_of(message: Message) -> Iterator[TensorProto]:
    if isinstance(message, TensorProto):
        yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if hasattr(value, "add") else [value]:
                yield from tensors_of(part)


@pytest.mark.parametrize("place", PLACES)
def test_weights_elsewhere_are_found_wherever_a_tensor_may_be(place):
    model = model_with(tensor("weights.bin"), place)
    assert has_external_data(model.SerializeToString())
    assert not has_external_data(model_with(tensor(), place).SerializeToString())
    (inside,) = tensors_of(model)
    inside.ClearField("data_location")
    assert has_external_data(model.SerializeToString())
    inside.data_location = TensorProto.EXTERNAL
    inside.ClearField("external_data")
    assert has_external_data(model.SerializeToString())


def test_damaged_bytes_hide_nothing():
    """After any change, a tensor that onnx reads from another file is found, or the bytes are refused."""
    rng = np.random.default_rng(0)
    originals = [model_with(tensor("weights.bin"), place).SerializeToString() for place in PLACES]
    found = 0
    for i in range(6000):
        content = bytearray(originals[i % len(originals)])
        for _ in range(rng.integers(1, 4)):
            place = rng.integers(len(content))
            content[place : place + rng.integers(3)] = rng.bytes(rng.integers(3))
        try:
            expected = any(t.external_data or t.data_location for t in tensors_of(onnx.ModelProto.FromString(content)))
        except DecodeError:
            expected = False
        try:
            result = has_external_data(bytes(content))
        except ValueError:
            result = True
        assert result or not expected, bytes(content)
        found += expected
    assert found > 500  # many of them are still models with weights in other files


def test_a_tag_that_overflows_hides_nothing():
    """C++ parsers read only the lower 32 bits of a tag."""
    inner = tensor("weights.bin").SerializeToString()
    graph = b"\x2a" + bytes([len(inner)]) + inner  # field 5: initializer
    tag = 7 << 3 | 2 | 1 << 32
    overflowing = bytes([*(tag >> shift & 127 | 128 for shift in range(0, 28, 7)), tag >> 28])
    assert has_external_data(overflowing + bytes([len(graph)]) + graph)


@pytest.mark.parametrize("content", [b"\xff" * 20, b"\x3a\x05abc", b"\x3b", b"\x39abc", b"\x80", b"not a model"])
def test_what_is_no_message_is_refused(content):
    with pytest.raises(ValueError, match="it "):
        has_external_data(content)


def test_a_parameter_named_location_is_no_reason_to_refuse_a_network(ddim_bundle, tmp_path):
    folder = shutil.copytree(ddim_bundle, tmp_path / "bundle")
    model = onnx.load(folder / "unet.onnx")
    first = model.graph.initializer[0].name
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == first:
                node.input[i] = "location"
    model.graph.initializer[0].name = "location"
    onnx.save(model, folder / "unet.onnx")
    seal(folder)
    np.testing.assert_array_equal(OnnxSampler(folder).sample(3), OnnxSampler(ddim_bundle).sample(3))


def test_a_model_of_onnx_runtimes_own_format_is_refused(ddim_bundle, tmp_path):
    """In that format, weights in other files would not be found."""
    import onnxruntime

    folder = shutil.copytree(ddim_bundle, tmp_path / "bundle")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "unet.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(folder / "unet.onnx", options)
    shutil.move(tmp_path / "unet.ort", folder / "unet.onnx")
    seal(folder)
    with pytest.raises(BundleError, match="can't load"):
        OnnxSampler(folder)


def test_each_file_is_read_once(ddpm_bundle, monkeypatch):
    """Otherwise the bytes that are used could differ from those that were checked."""
    names = []

    def read_file(folder, name, info):
        names.append(name)
        return (folder / name).read_bytes()

    monkeypatch.setattr(runtime, "read_file", read_file)
    monkeypatch.setattr(runtime.StepTable, "load", None)
    sampler = OnnxSampler(ddpm_bundle, num_threads=2)
    sampler.sample(1)
    sampler.sample(100, batch_size=10)  # sessions of two threads, and of one
    assert len(sampler._sessions) == 2
    assert sorted(names) == ["step_table.json", "unet.onnx"]
