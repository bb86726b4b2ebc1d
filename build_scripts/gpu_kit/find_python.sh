#!/usr/bin/env bash
# Prints the interpreter that the GPU suite runs and the kit is unpacked for: $PYTHON if set, else python or python3,
# whichever has torch, else python3.
set -u
has_torch='import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
for candidate in ${PYTHON:+"$PYTHON"} python python3; do
  if [ -n "${PYTHON:-}" ] || "$candidate" -c "$has_torch" 2>/dev/null; then
    echo "$candidate"
    exit 0
  fi
done
echo python3
