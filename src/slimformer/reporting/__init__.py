"""Shows people what was measured: ledger, terminal, page and model card.

`ledger` writes and reads records, `verdicts` judges them, `words` and `circumstances` say it. `terminal`, `page` (with
`sections`, `figures`, `svg` and `answers`) and `card` draw. `inspection` counts what could be cut. Nothing here measures.
"""
