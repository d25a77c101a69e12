"""Small offline worlds: their questions, the models trained on them, and their tasks for lm-eval."""
