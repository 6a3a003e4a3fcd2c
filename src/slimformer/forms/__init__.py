"""One file per way to store a matrix; `base.py` is the contract of the module that stands in a Linear's place."""
