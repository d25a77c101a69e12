"""A merge by several workers, on one machine or many, that survives being killed: `run`.

mergekit plans, merges each tensor and writes the files around the weights. Workers are threads of
this process, or processes that Ray starts. This folder divides the plan among them. It works for
every merge method of mergekit. From the command line down:

    command.py       the options of `mergekit-monosoup run`, its messages and exit codes
    stages.py        a file of several stages, each a merge of its own: order, folders, what is done
    alone.py         a merge by mergekit itself, whose model is put into OUT when it is whole
    driver.py        a merge from claiming OUT to publishing the model; ties the rest together
    plan.py          mergekit's plan divided into batches of tensors, by size and memory
    preconditions.py what is looked at before a merge: its models, and where it writes
    engines.py       who executes batches: this process, or workers of Ray
    threads.py       or threads of this process, on all cores
    worker.py        what a worker does with a batch
    making.py        where it writes a batch, and how that is kept
    folder.py        OUT while the merge is unfinished: what is kept on disk
    records.py       what the JSON files there hold
    finished.py      whether --resume finds nothing to do, and the command that goes on
    publication.py   which file of a complete merge goes where, and no file elsewhere
    vocabulary.py    the tokenizer, and the order of its tokens for a merge that is resumed
    dependencies.py  what the result depends on, so that only an unchanged merge is resumed
    progress.py      the bar on stderr
"""
