"""`python -m jaxalign.train`: see jaxalign/cli/train.py."""

from jaxalign.core.exits import start_module

if __name__ == "__main__":
  start_module("jaxalign.cli.train", "jaxalign: reading the config")
