"""Integer grids, and the ranges that activations span on them."""
