"""`python -m latentmill` is the `latentmill` command."""

from latentmill.cli.entry import main

main()
