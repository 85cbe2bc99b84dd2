"""Token losses, and the directions M made of them: target, Fisher and drift, curvature, retention; trainings.

In: a model, its reference and batches of tokens.
Out: a matrix for every linear map of the scoring blocks, per objective.
Open first: target.py and drift.py; rehearsal.py for the training to come.
"""
