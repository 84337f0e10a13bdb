"""`python -m jaxalign.agreement`: see jaxalign/cli/agreement.py."""

from jaxalign.cli.agreement import main
from jaxalign.cli.main import start

if __name__ == "__main__":
  start(main)
