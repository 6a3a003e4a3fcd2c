"""Students of other kinds than a transformer: their configs and models as transformers' classes. Their families say what can be cut."""
