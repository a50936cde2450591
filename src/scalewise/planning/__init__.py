"""What a recipe costs, and schedules from a spectrum."""
