#!/usr/bin/env bash
# Packs gpu_kit/ on a machine with a package index, and unpacks it on one with a GPU: see --help. PYTHON names the
# interpreter (default: python or python3, whichever has torch, as for gpu_suite.sh); packing needs the development environment, --unpack nothing but Python and pip.
#
#   bash build_scripts/pack_gpu_kit.sh [--python 3.12] [--tensorrt-root DIR] [--flashinfer] [--model FILE | --no-model]
#   bash build_scripts/pack_gpu_kit.sh --unpack
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$(bash build_scripts/gpu_kit/find_python.sh)" -m build_scripts.gpu_kit "$@"
