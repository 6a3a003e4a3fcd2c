"""The one training loop and what it needs. Nothing else owns time."""
