"""Comparison of checkpoints on ID and OOD tasks: does the edit help more than shrinkage does?"""

from evaluation.engines import torchvision_import

torchvision_import.install()
