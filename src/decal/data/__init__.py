"""Rows -> Batch; knows nothing of models.

source.py    `data` settings -> Example (example.py), through
             readers.py   files, by suffix               hub.py       hub data sets, folders
             columns.py   columns made from others       layouts.py   what columns mean
             messages.py  lists of messages              problems.py  what is wrong, said once
chat.py      Example -> Sample: tokens and which of them are trained, through
             template.py  chat -> text                   spans.py     text -> where turns are
             tokens.py    text -> tokens
label.py     Example -> Sample: texts with labels, for classifiers
pack.py      Sample -> Step of Batch: order, token budgets, both layouts (order.py: permutations)
stats.py     what all this will train, in numbers
"""
