"""`python -m shrink` is the command."""

from shrink.cli import main

main()
