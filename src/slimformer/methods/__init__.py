"""One file per published idea, each with the same order of parts; `base.py` is the contract: four verbs and `effects`."""
