"""`python -m jaxalign.agreement`: see jaxalign/cli/agreement.py."""

from jaxalign.core.exits import start_module

if __name__ == "__main__":
  start_module("jaxalign.cli.agreement")
