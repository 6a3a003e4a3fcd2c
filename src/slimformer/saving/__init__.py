"""Model folders and other files, written whole or not at all, and the digest that names a model's weights."""
