"""The command line: ``numbasparse quickstart | tune | bench | report | prune``."""

from numbasparse.cli.commands import main

__all__ = ["main"]
