"""Algebra on weight files, streamed, without a model object.

merge.py  base + adapter -> a new model folder
delta.py  the sum of one tensor and one low-rank delta, and what rounding left of it
"""
