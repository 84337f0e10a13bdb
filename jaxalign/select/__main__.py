"""`python -m jaxalign.select`: see jaxalign/cli/select.py."""

from jaxalign.core.exits import start_module

if __name__ == "__main__":
  start_module("jaxalign.cli.select", "jaxalign: reading the config")
