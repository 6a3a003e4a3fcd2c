"""One file per skeleton: a family is a table of names, and all that is known of an architecture stands in its file.

`base.py` is the contract, `_skeleton.py` the table to fill in, `_builder.py` turns it into the anatomy of a model.
"""
