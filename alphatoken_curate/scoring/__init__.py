"""A scoring as a job: prepared, planned, budgeted, run by the one loop, refreshed, estimated.

In: a `ScoreConfig`, or a run and a checkpoint.
Out: a run folder with values, a mask and loss weights; or a summary of what it would take.
Open first: score.py, then prepare.py and scorer.py.
"""
