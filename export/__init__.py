"""Export and read bundles: `python -m export`, the format, golden vectors, ports."""
