"""`python -m jaxalign.main`: see jaxalign/cli/main.py."""

from jaxalign.cli.main import main, start

if __name__ == "__main__":
  start(main)
