"""A run as one HTML page that asks the network for nothing.

In: a run folder, read as flat columns.
Out: report.html, with report.css and report.js inside.
Open first: report.py.
"""
