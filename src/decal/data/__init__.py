"""Rows -> Batch; knows nothing of models.

source.py    files and hub data sets -> Example (problems.py: what is wrong with rows, said once)
chat.py      Example -> Sample: tokens and which of them are trained (spans.py: where turns are)
pack.py      Sample -> Step of Batch: order, token budgets, both layouts (order.py: permutations)
stats.py     what all this will train, in numbers
"""
