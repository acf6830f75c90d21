"""`python -m megaswitch`, which is what torchrun starts."""

from megaswitch.cli import main

main()
