"""The method of the paper; imports nothing else of scalewise."""
