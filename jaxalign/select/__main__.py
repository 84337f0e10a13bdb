"""`python -m jaxalign.select`: see jaxalign/cli/select.py."""

import runpy

if __name__ == "__main__":
  runpy.run_module("jaxalign.cli.select", run_name="__main__", alter_sys=True)
