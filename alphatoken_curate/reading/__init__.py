"""Finished runs, read: scanned, verified, published, summed, compared, and the rows of a mask.

In: a run folder, never changed here.
Out: lazy frames, rows, statistics, comparisons, problems, the rows that train.
Open first: scan.py.
"""
