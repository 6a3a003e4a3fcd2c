"""The algebra: what could be cut, what is kept, what it costs. `shrink` is the only code that changes shapes."""
