"""Find references to weights in other files in the bytes of an ONNX file, without the onnx package."""

from __future__ import annotations

from collections.abc import Iterator

# Messages that contain tensors, by their fields: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3
TENSORS_IN = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "Tensor": {},
}
EXTERNAL_DATA, DATA_LOCATION = 13, 14  # fields of a tensor


def has_external_data(model: bytes) -> bool:
    """Return whether any tensor of an ONNX model has its values in another file.

    Raises:
        ValueError: if the bytes are not a protobuf message.
    """
    waiting = [("Model", memoryview(model))]
    while waiting:
        kind, message = waiting.pop()
        for field, value in _fields(message):
            if kind == "Tensor" and (field == EXTERNAL_DATA or (field == DATA_LOCATION and value != 0)):
                return True
            if field in TENSORS_IN[kind] and isinstance(value, memoryview):
                waiting.append((TENSORS_IN[kind][field], value))
    return False


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield each field's number and value (https://protobuf.dev/programming-guides/encoding)."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        tag %= 2**32  # like parsers in C++
        wire_type = tag % 8
        if wire_type == 0:
            number, place = _varint(message, place)
            yield tag // 8, number
        elif wire_type in (1, 2, 5):
            size, place = _varint(message, place) if wire_type == 2 else ({1: 8, 5: 4}[wire_type], place)
            if size > len(message) - place:
                raise ValueError("it ends too early")
            yield tag // 8, message[place : place + size]
            place += size
        else:
            raise ValueError(f"it has a field of unknown wire type {wire_type}")


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """Read a varint, 7 bits per byte, lowest bits first; return it and the place after it."""
    number = 0
    for shift in range(0, 70, 7):
        if place == len(message):
            raise ValueError("it ends too early")
        byte = message[place]
        place += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, place
    raise ValueError("it has a number longer than 64 bits")
