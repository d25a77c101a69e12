"""Small offline worlds: items with one right answer, models trained on them, tasks of them."""
