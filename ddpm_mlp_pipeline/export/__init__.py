"""Export: schedulers to step tables, networks to ONNX, bundles to pages, each checked against the original."""
