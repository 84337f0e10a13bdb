"""`python -m jaxalign.select`: see jaxalign/cli/select.py."""

from jaxalign.cli.main import start
from jaxalign.cli.select import main

if __name__ == "__main__":
  start(main)
