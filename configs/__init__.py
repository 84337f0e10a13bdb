"""Experiments: plain Python files that override configs/common.py."""
