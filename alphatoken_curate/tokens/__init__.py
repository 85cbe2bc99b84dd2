"""Rows become tokens and the mask of those that respond; tokens become batches.

In: rows in normal form, a tokenizer and its chat template.
Out: `TokenRow`s and pairs of them, and padded batches by shard.
Open first: tokenise.py, then plan.py.
"""
