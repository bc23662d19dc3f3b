"""`python -m memento_sgl.cli`."""

from memento_sgl.cli.app import main

main()
