"""Export schedulers as step tables, networks as ONNX and bundles as web pages, and check each against the original."""
