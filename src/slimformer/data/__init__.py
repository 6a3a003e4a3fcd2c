"""From names of data to padded batches. What the columns mean is the business of tasks.

`sources` finds train and dev data, `files`, `squad`, `parallel` and `pairs` read them, `columns`, `labels` and `glue` make sense of
tables, `splits` draws parts; `tokenizer` loads a model's tokenizer, out of what `tokenizer_files` finds in its folder, `batching` pads
rows of like length, `augmentation` makes more rows, and `material` holds the encoded data of one run. `intents.txt` is the grammar of
the built-in task.
"""
