"""A merge by several worker processes, on one machine or many, that survives being killed: `mergekit-monosoup run`.

mergekit plans, merges each tensor and writes the files around the weights; Ray starts the workers. What is here divides the
plan (:mod:`.plan`), executes a part of it (:mod:`.worker`), hands parts out (:mod:`.engines`), keeps what is finished
(:mod:`.folder`, :mod:`.fingerprint`) and ties these together (:mod:`.driver`). Works for every merge method.
"""
