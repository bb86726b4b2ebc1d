"""Everything that needs a GPU, in parts of at most nine minutes; see ``gpu_suite.sh``.

--help and --dry-run need nothing but Python; --dry-run names what each step lacks here. The status is 0 only if every
step of the part ran and ended well.
"""

from __future__ import annotations

import argparse
import datetime
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

# A bare machine runs this file by its path, before anything is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu.needs import KIT, ROOT, WORK
from benchmarks.gpu.software import describe_software, gpu_name, list_steps
from benchmarks.gpu.step_runner import Step, Suite
from benchmarks.gpu.steps import HELD_BACK_S, PARTS, SECONDS_A_PART, make_steps
from trtllm_memshare.evaluation.machine import commit


def main() -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=PARTS, default=1, help="1 first: it has what matters most")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "build" / "gpu_suite", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=SECONDS_A_PART, help="for the part, all in (default: 540)")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--dry-run", action="store_true", help="list the steps and what is missing, run nothing")
    options = parser.parse_args()
    steps = make_steps(options.part, sys.executable)
    unknown = set(options.steps or ()) - {step.name for step in steps}
    if unknown:
        names = ", ".join(step.name for step in steps)
        parser.error(f"part {options.part} has no step {', '.join(sorted(unknown))} (it has {names})")
    steps = [step for step in steps if options.steps is None or step.name in options.steps]
    gpu = gpu_name()
    if options.dry_run:
        print(list_steps(steps, gpu, SECONDS_A_PART - HELD_BACK_S))
        return int(gpu is None or any(step.missing for step in steps))
    software = describe_software()
    print("; ".join(f"{name} {version}" for name, version in software.items()), flush=True)
    if gpu is None or all(step.missing for step in steps):
        listed = list_steps(steps, gpu, SECONDS_A_PART - HELD_BACK_S)
        print(listed, "error: nothing can run here, see above", sep="\n", file=sys.stderr)
        return 2
    head: dict[str, Any] = {
        "command": " ".join(["bash benchmarks/gpu_suite.sh", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "device": gpu,
        "software": software,
        "commit": commit(),
        "kit": sorted(path.name for path in KIT.iterdir()) if KIT.is_dir() else None,
    }
    device = re.sub(r"[^a-z0-9]+", "_", gpu.lower().removeprefix("nvidia ")).strip("_")
    seconds = options.seconds - HELD_BACK_S - (time.monotonic() - started)
    return _run(steps, Suite(WORK, options.output_dir, f"gpu_{device}_part{options.part}", ROOT, seconds, head))


def _run(steps: list[Step], suite: Suite) -> int:
    def end(number: int, _: Any) -> None:
        suite.interrupt()
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    for place, step in enumerate(steps, 1):
        suite.run(step, sum(later.limit_s for later in steps[place:] if later.missing is None))
    print(f"\n{suite.report} (benchmarks/results/ is its place)\n{suite.table()}")
    return int(suite.has_failed)


if __name__ == "__main__":
    sys.exit(main())
