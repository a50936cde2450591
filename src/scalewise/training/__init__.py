"""From a recipe to a trained student."""
