"""Judging: how far samples are from data, how likely data are, and what may have gone wrong."""
