"""Recipes: the frozen configuration of a run, and the named presets."""
