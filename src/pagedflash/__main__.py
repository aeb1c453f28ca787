"""``python -m pagedflash``: the ``pagedflash`` command."""

from .cli import main

main()
