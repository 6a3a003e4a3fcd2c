"""What people look at: ledger, verdicts, tables, figures, page, card."""
