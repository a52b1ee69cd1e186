"""``python -m attnzoo`` is the ``attnzoo`` command."""

from attnzoo.cli.app import main

main()
