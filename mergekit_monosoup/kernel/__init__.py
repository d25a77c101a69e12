"""The mathematics of both methods, on tensors: no mergekit, no files."""
