"""The algebra: an `Anatomy` names the parts of a model, a `Plan` those that are kept, a `Cost` their price.

`shrink` carries a plan out and is the only code that changes shapes; `budget` chooses the units that fit a cost. Forms
of matrices and ranges of activations are here because plans, anatomies and decisions speak of them. Nothing here knows
a family, a method or a file format.
"""
