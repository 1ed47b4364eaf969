"""`python -m latentmill` is the `latentmill` command."""

from latentmill.entry import main

main()
