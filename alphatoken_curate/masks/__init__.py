"""Values to masks and loss weights.

In: stored signals of one generation or several, and the settings of a mask.
Out: a weight for each response token, written to train/mask=N.
Open first: remask.py, then choose.py for the rule.
"""
