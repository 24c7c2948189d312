"""Memory and time before any is spent: plain numbers in, plain numbers out.

    shapes.py     config.json facts of well-known models
    cards.py      memory of well-known GPUs
    units.py      15GB, 15GiB and 24G as bytes, and back
    structure.py  what a model consists of, and what its weights weigh in a format
    setup.py      a training in plain numbers
    kept.py       what a pass keeps for backward
    memory.py     what is held when, and the peak of it     (read this first)
    cost.py       operations of a token, and the time they take
    cheapest.py   the smallest change of settings that fits
    calibrate.py  how fast this machine multiplies

Knows no modules and no files: `verbs/plan.py` reads models, and hands on names and numbers.
"""
