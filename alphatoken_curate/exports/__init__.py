"""Files that other trainers read, made from the rows of a mask.

train/ stays the one source. An export is derived from it, read back before it appears, and says which run, mask and
settings it came from. `export.export` writes one; a module for each family of trainers says what it reads.
"""
