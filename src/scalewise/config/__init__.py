"""Recipes: a run as a value, and named ones."""
