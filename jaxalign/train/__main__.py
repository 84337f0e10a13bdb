"""`python -m jaxalign.train`: see jaxalign/cli/train.py."""

from jaxalign.cli.main import start
from jaxalign.cli.train import main

if __name__ == "__main__":
  start(main)
