"""`python -m scalewise` is the command line."""

from scalewise.cli import main

main()
