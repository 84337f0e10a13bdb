"""`python -m jaxalign.main`: see jaxalign/cli/main.py."""

from jaxalign.core.exits import start_module

if __name__ == "__main__":
  start_module("jaxalign.cli.main", "jaxalign: reading the config")
