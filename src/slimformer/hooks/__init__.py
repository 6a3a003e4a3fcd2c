"""Changes to a live model that are gone afterwards, each a context manager; nothing here is ever saved.

`gating` is the only code that masks units. `weights` masks and changes weights, `points` changes activations, `capture`
looks at hidden states and attention scores, `attention` computes the attention that the others look into. `feeding` runs passes
from a layer in the middle, and `precision` in bfloat16 where that is faster.
"""
