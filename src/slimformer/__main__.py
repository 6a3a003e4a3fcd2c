"""`python -m slimformer`: the command line, where its script is not on the path."""

from slimformer.cli import main

main()
