"""The command line: ``attnzoo`` and its subcommands."""
