"""`python -m jaxalign.generate`: see jaxalign/cli/generate.py."""

from jaxalign.core.exits import start_module

if __name__ == "__main__":
  start_module("jaxalign.cli.generate")
