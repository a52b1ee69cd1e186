"""Run the ``attnzoo`` command as ``python -m attnzoo``."""

from attnzoo.cli.app import main

main()
