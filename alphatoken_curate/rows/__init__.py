"""Files on disk become rows: containers, columns, shapes, and bad rows named.

In: DATA as it was named: files, folders, globs, a data set that was saved or is on the Hub.
Out: a `RowStream` of chats, texts, tokens or pairs in normal form, with bad rows beside it.
Open first: read.py.
"""
