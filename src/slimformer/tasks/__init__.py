"""One file for each task type: its data, its options, its loss, its metrics, and the code that reads an exported file."""
