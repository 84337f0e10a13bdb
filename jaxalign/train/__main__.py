"""`python -m jaxalign.train`: see jaxalign/cli/train.py."""

import runpy

if __name__ == "__main__":
  runpy.run_module("jaxalign.cli.train", run_name="__main__", alter_sys=True)
