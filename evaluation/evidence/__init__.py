"""Evidence over several seeds for what the paper claims: `python -m evaluation.evidence`.

models.py trains and lists what is compared, experiment.py asks the models of one seed, collect.py
turns their results into one JSON file, claims.py reads those files and nothing else, and says what
holds.
"""
