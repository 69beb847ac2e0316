"""ε-network and scheduler to ONNX, and the runtime that samples from it.

Installed as `ddpm_mlp_pipeline.export`. `runtime`, `step_table`, `noise` and `sample` need numpy and onnxruntime only;
`compile`, `exporter`, `parity` and the export command need torch and diffusers.
"""
