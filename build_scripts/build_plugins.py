"""Builds the TensorRT plugin library, or with --check compiles every CUDA kernel without a GPU."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from trtllm_memshare.engine.plugin_build import (
        build_plugin,
        check_kernels,
        plan_plugin_build,
        resources_table,
        spilling,
    )
    from trtllm_memshare.errors import UserError, run_command_line
    from trtllm_memshare.search.kernel_compiler import ARCHITECTURES
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="compile the kernels with NVRTC, print what they need")
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), help="for --check (default: %(default)s)")
    parser.add_argument("--tensorrt-root", type=Path, help="folder with TensorRT's include/ (default: $TENSORRT_ROOT)")
    parser.add_argument("--preset", default="release", help="release, native or hopper (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, default=Path("build/plugins"), help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.check:
        checked = check_kernels(arguments.arch)
        print(resources_table(checked))
        if spills := spilling(checked):
            raise UserError(f"no kernel may spill registers, got {', '.join(spills)} (lower its vector width)")
        print(f"{sum(map(len, checked.values()))} kernels compiled for {', '.join(checked)}; none spills")
        return
    library = build_plugin(plan_plugin_build(arguments.tensorrt_root, arguments.preset, arguments.output_dir))
    print(f"plugin: {library} ({library.stat().st_size / 2**20:.1f} MiB); harness: {library.parent}/plugin_harness")


if __name__ == "__main__":
    run_command_line(main)
