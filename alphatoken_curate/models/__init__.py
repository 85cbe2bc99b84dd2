"""Models, adapters and checkpoints: found by name, checked, digested, loaded, compared.

In: what a user named: a folder, a GGUF file, a Hub id, an adapter, a training's output.
Out: a `ModelSource` with its digest, the loaded model, its tokenizer.
Open first: load.py.
"""
