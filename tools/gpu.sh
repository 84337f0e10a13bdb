#!/usr/bin/env bash
# Every GPU figure, with the flags of tools/gpu.py (--out, --sections, --toy).
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" tools/gpu.py "$@"
