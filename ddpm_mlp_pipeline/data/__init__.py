"""Data sets, as `datasets.Dataset`."""
