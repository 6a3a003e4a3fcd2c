"""For authors of plug-ins: `checks` are the contracts that each kind must pass, `tiny` makes the random models they run on.

`slimformer check NAME` runs the checks of everything that is installed under a name.
"""
