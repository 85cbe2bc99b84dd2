"""What the blocks of a model are made of, and what flows through their linear maps, backward and in forward mode.

In: a loaded model and how many of its last blocks score.
Out: a `ScoringModel` whose linear maps tell their inputs and error signals, and functions that carry tangents.
Open first: capture.py for paths, tangents.py for influence.
"""
