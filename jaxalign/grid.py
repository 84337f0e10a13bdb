"""`python -m jaxalign.grid`: see jaxalign/cli/grid.py."""

from jaxalign.core.exits import start_module

if __name__ == "__main__":
  start_module("jaxalign.cli.grid")
