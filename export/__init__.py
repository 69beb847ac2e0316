"""ε-network and scheduler to ONNX. Installed as `ddpm_mlp_pipeline.export`."""
