"""What was read, as text and pictures for a terminal. Nothing here prints.

In: rows, statistics and comparisons from reading/.
Out: rich text and tables, SVG and PNG.
Open first: row_text.py; heat.py for colours and safe text.
"""
