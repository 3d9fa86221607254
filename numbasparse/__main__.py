"""``python -m numbasparse``: the command line."""

from numbasparse.cli import main

main(prog_name="numbasparse")
