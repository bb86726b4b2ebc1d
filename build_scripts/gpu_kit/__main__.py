"""Gathers what a machine with a GPU lacks, on one with a package index; --unpack puts it in place on the other.

The kit is gpu_kit/ in the repository, ignored by git: wheels for the other machine's Python, TensorRT's include/ where
--tensorrt-root names a folder with it, FlashInfer with --flashinfer, and a real model as a GGUF file, cut into parts
where a transfer is limited. Without FlashInfer decode attention runs in Triton.

--unpack installs the wheels into gpu_kit/site, which gpu_suite.sh puts on the path, and joins the parts of the model
that have arrived: it says which are still missing. torch, triton, transformers, accelerate, peft, pytest and nvcc are
taken to be there; benchmarks/gpu_suite.sh --dry-run names what is not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from build_scripts.gpu_kit.layout import ROOT, Kit, KitError
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="pack_gpu_kit.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--unpack", action="store_true", help="put the kit that is here in place")
    parser.add_argument("--python", default="3.12", help="of the other machine (default: %(default)s)")
    parser.add_argument("--tensorrt-root", type=Path, metavar="DIR", help="folder with TensorRT's include/")
    parser.add_argument("--flashinfer", action="store_true", help="FlashInfer, its modules compiled (ten minutes)")
    parser.add_argument("--arch", default="9.0a", help="of these modules (default: %(default)s, H100 and H200)")
    parser.add_argument("--model", type=Path, metavar="FILE", help="a GGUF file (default: SmolLM2-135M of a wheel)")
    parser.add_argument("--no-model", action="store_true", help="leave the model out")
    parser.add_argument("--part-mib", type=int, default=30, help="of its parts; 0: one piece (default: %(default)s)")
    options = parser.parse_args()
    kit = Kit(ROOT / "gpu_kit")
    try:
        if options.unpack:
            from build_scripts.gpu_kit.unpacking import unpack

            print(*unpack(kit), sep="\n")
            return 0
        from build_scripts.gpu_kit.packing import PackOptions, pack

        wanted = PackOptions(
            options.python, options.tensorrt_root, options.model, not options.no_model, options.part_mib,
            options.flashinfer, options.arch,
        )  # fmt: skip
        print(*pack(kit, wanted), sep="\n")
    except KitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("packed: copy gpu_kit/ into the repository on the machine with the GPU, then "
          "bash build_scripts/pack_gpu_kit.sh --unpack")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
