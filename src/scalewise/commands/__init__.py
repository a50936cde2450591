"""What the commands do; `cli` reads their options."""
