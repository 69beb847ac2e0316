"""What others need who export or read a bundle: `python -m export`, the format, golden vectors, ports."""
