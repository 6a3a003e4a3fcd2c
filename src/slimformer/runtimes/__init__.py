"""One file per engine that runs exported files; `base.py` is the contract."""
