"""How a model becomes a file for the compiled kernels: its encoder packed, its head of standard operators."""
