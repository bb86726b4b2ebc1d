#!/usr/bin/env bash
# Prints a Python between 3.10 and 3.12: $PYTHON if set, else the first that runs.
set -u
for candidate in ${PYTHON:-python3.11 python3.12 python3.10 python3}; do
  if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
    echo "$candidate"
    exit 0
  fi
done
echo "no Python 3.10 to 3.12 found among: ${PYTHON:-python3.11 python3.12 python3.10 python3} (set PYTHON=...)" >&2
exit 1
