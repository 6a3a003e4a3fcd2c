"""One file per file format: an exporter writes a model and proves that the file computes the same; `base.py` is the contract."""
