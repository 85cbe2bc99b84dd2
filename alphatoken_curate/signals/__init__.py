"""The numbers of each token: paths, influence, pairs, and the value they add up to.

In: captured inputs and error signals of a batch, and directions.
Out: `StoredSignals`' columns: a float32 per token and signal, a number per pair.
Open first: paths.py.
"""
