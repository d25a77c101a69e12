"""A complete MonoSoup run on models trained on the spot: `python -m demo`. No network, no GPU."""

import os

# Set before transformers is first imported, which reads them once: a demo that must run offline
# should fail at once on a missing file instead of asking the hub for it, and the tokenizer must not
# fork threads.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import evaluation  # noqa: F401 - first: it makes torchvision importable beside a torch for the CPU
