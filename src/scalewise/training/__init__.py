"""Training: from a recipe to a student."""
