"""Did the edit help, and more than plain shrinkage would? Compares checkpoints on ID and OOD tasks with lm-eval."""
