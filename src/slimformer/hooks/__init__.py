"""Changes to a live model that are gone afterwards. `gating` is the only code that masks units."""
