"""Comparison of checkpoints on ID and OOD tasks: does the edit help more than shrinkage does?"""
