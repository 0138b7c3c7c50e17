"""``python -m dptrain`` is the ``dptrain`` command."""

from dptrain.cli.main import main

main()
