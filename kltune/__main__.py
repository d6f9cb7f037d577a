"""``python -m kltune`` is the ``kltune`` command."""

from kltune.cli import main

main()
