"""Samplers under comparison, scored, timed and reported."""
