"""Sampling from a bundle, with numpy and ONNX Runtime only: nothing here imports torch, diffusers or onnx."""
