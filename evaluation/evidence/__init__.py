"""Every claim of the paper that a small world can test, over several seeds: `python -m evaluation.evidence`.

models.py trains and lists what is compared, collect.py turns one seed's results into one JSON file, claims.py reads
those files and nothing else, and says what holds.
"""
