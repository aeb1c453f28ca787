"""``python -m pagedflash``: the ``pagedflash`` command."""

from .cli.main import main

main()
