"""`python -m jaxalign.grid`: see jaxalign/cli/grid.py."""

from jaxalign.cli.grid import main
from jaxalign.cli.main import start

if __name__ == "__main__":
  start(main)
