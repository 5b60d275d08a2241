"""Training: a recipe says all of a run, the loop runs it, checkpoints keep it."""
