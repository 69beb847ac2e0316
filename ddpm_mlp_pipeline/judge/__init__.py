"""Distances between samples and data, likelihood of data, and checks for common faults."""
