"""`python -m jaxalign.train`: see jaxalign/cli/train.py."""

import importlib

if __name__ == "__main__":
  exits = importlib.import_module("jaxalign.cli.exits")
  exits.start_module("jaxalign.cli.train", "jaxalign: reading the config")
