"""``python -m sage_reconcile``."""

from sage_reconcile.cli.main import main

main()
