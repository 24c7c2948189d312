"""Algebra on weight files, streamed, without a model object.

merge.py    base + adapter -> a new model folder
changes.py  what an adapter makes of which tensor, and whether it fits
delta.py    the sum of one tensor and one low-rank delta, and what rounding left of it
"""
