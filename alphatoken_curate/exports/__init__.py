"""The rows of a mask as files that other trainers read: derived from train/, read back before they appear.

In: a mask's rows and the name of a trainer.
Out: a folder with the trainer's files, a README of config lines, and export.json.
Open first: export.py; form.py for what an exporter is.
"""
