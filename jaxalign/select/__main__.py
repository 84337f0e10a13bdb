"""`python -m jaxalign.select`: see jaxalign/cli/select.py."""

import importlib

if __name__ == "__main__":
  exits = importlib.import_module("jaxalign.cli.exits")
  exits.start_module("jaxalign.cli.select", "jaxalign: reading the config")
