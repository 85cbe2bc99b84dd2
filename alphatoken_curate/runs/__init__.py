"""A run on disk: its columns, shards, manifest and artefacts, and how each of them is committed and read back.

In: rows with their signals, masks, tensors, and the fingerprint of what made them.
Out: files that appear whole or not at all, and tables whose digests were checked.
Open first: schema.py, then shards.py and manifest.py.
"""
