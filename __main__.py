"""`python -m kvfold` is the `kvfold` command."""

from .server.cli import main

main()
