"""`python -m jaxalign.generate`: see jaxalign/cli/generate.py."""

from jaxalign.cli.generate import main
from jaxalign.cli.main import start

if __name__ == "__main__":
  start(main)
