"""`python -m mnemon` is the same as `mnemon`."""

from mnemon.cli.app import main

main()
