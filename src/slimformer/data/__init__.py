"""From files to padded batches: reading, tokenizing, collating, augmenting."""
