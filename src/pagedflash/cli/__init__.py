"""The ``pagedflash`` command: ``main`` has its subcommands, the other modules what they do."""
