"""The list of pages, the rows of the block table, activation in every process, and the two wrapped commands."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from trtllm_pytorch.fake_package import write_fake_package

import trtllm_memshare
from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.pytorch import wrap
from trtllm_memshare.trtllm.pytorch.page_list import PageList
from trtllm_memshare.trtllm.pytorch.row_map import RowMap
from trtllm_memshare.trtllm.pytorch.tail_swap import TailSwap
from trtllm_memshare.trtllm.pytorch.wrap import place_option

ROOT = Path(trtllm_memshare.__file__).parents[1]


def test_pages_move_from_the_end_into_the_holes():
    """The picture in the module's docstring."""
    pages = PageList()
    pages.extend(6)
    assert pages.give_up([2, 3]) == [(4, 2), (5, 3)]
    assert pages.block_at == [0, 1, 4, 5]
    assert pages.position == [0, 1, -1, -1, 2, 3]
    pages.extend(7)
    assert pages.position[6] == 4
    # Blocks 2 and 3 read block 5; blocks 7 and 8 will come at the end of the list, whether 7 is known or not.
    for known in (6, 8):
        origins = np.array([0, 1, 5, 5, 4, 5, 6, 7])[:known]
        assert pages.row(origins, 9).tolist() == [0, 1, 3, 3, 2, 3, 4, 5, 6]


@given(st.data())
def test_a_page_list_follows_a_plain_list(data):
    """Against a list of names that is compacted by hand."""
    pages, names = PageList(), []
    for _ in range(data.draw(st.integers(1, 6))):
        grow = pages.num_blocks + data.draw(st.integers(0, 5))
        names += list(range(pages.num_blocks, grow))
        pages.extend(grow)
        gone = data.draw(st.lists(st.sampled_from(sorted(names)), unique=True)) if names else []
        moved = pages.give_up(gone)
        end = len(names) - len(gone)
        assert all(source >= end > target for source, target in moved)
        for source, target in moved:
            names[target] = names[source]
        del names[end:]
        assert pages.block_at == names
        assert sorted(names) == [b for b, p in enumerate(pages.position) if p >= 0]


def test_a_page_cannot_be_given_up_twice():
    pages = PageList()
    pages.extend(4)
    pages.give_up([1])
    with pytest.raises(RuntimeError, match="must be distinct and have pages"):
        pages.give_up([1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_pages_of_any_element_type_are_copied_whole(dtype):
    """More of them than are copied together; pages that are in no move stay as they are."""
    width = 4 * torch.empty(0, dtype=dtype).element_size()
    content = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (24, 2, 2, 3, 8, width)).astype(np.uint8))
    pool = content.clone().view(dtype)
    tail = TailSwap(SimpleNamespace(pool=pool), 4, lambda: None, lambda request_id: None)
    moves = [(14 + i, i) for i in range(0, 10)]
    tail._copy(moves)
    tail._copy([])
    expected = content.clone()
    for source, target in moves:
        expected[target] = content[source]
    assert torch.equal(pool.view(torch.uint8), expected)


def test_only_rows_of_known_requests_are_rearranged():
    rows = RowMap(2, 4, torch.device("cpu"))
    table = torch.arange(24, dtype=torch.int32).reshape(1, 3, 2, 4)
    before = table.clone()
    assert rows.gather(table, [7, 8, 9]) == 0
    rows.set_row(8, np.array([3, 1, 1, 0]))
    assert rows.gather(table, [7, 8, 9]) == 1
    assert torch.equal(table[:, [0, 2]], before[:, [0, 2]])
    assert table[0, 1].tolist() == [[11, 9, 9, 8], [15, 13, 13, 12]]
    rows.forget(8)
    assert rows.gather(table, [7, 8, 9]) == 0
    for request_id in (1, 2):  # slots come back
        rows.set_row(request_id, np.arange(4))
    assert 2 in rows
    assert 8 not in rows


def test_rows_are_those_of_a_plain_gather_whoever_comes_and_goes():
    """Rows set anew, requests in other places of the table, null pages taken in between, slots given back."""
    rng = np.random.default_rng(0)
    width, bands = 9, 3
    for _ in range(40):
        rows, expected, null, ids = RowMap(6, width, torch.device("cpu")), {}, None, []
        for step in range(30):
            if step == 10:
                null = rows.null_entries = torch.from_numpy(rng.integers(0, 99, (1, 2, bands)).astype(np.int32))
            for request_id in rng.integers(0, 12, rng.integers(0, 3)).tolist():
                if request_id in expected or len(expected) < 6:
                    expected[request_id] = rng.integers(0, width + bands * (null is not None), width)
                    rows.set_row(request_id, expected[request_id])
            if expected and rng.random() < 0.2:
                gone = int(rng.choice(list(expected)))
                del expected[gone]
                rows.forget(gone)
            if rng.random() < 0.4:
                ids = rng.permutation(14)[: rng.integers(0, 8)].tolist()
            table = torch.from_numpy(rng.integers(0, 999, (1, 9, 2, width + step % 2)).astype(np.int32))
            wanted = table.clone()
            for row, request_id in enumerate(ids):
                if request_id in expected:
                    own = table[:, row, :, :width]
                    readable = own if null is None else torch.cat([own, null], 2)
                    wanted[:, row, :, :width] = readable[:, :, expected[request_id]]
            assert rows.gather(table, ids) == sum(i in expected for i in ids)
            assert torch.equal(table, wanted)


@pytest.fixture
def installed(tmp_path) -> Path:
    """A folder with a fake of TensorRT-LLM; the activation file is where the installation of this package put it."""
    write_fake_package(tmp_path)
    return tmp_path


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_on_a_gpu_are_those_of_the_cpu():
    """On a stream of its own, with rows that change between tables, as a serving loop does it."""
    rng = np.random.default_rng(0)
    stream = torch.cuda.Stream()
    on_cpu, on_gpu = RowMap(64, 200, torch.device("cpu")), RowMap(64, 200, torch.device("cuda"))
    for _ in range(50):
        for request_id in rng.integers(0, 64, 5).tolist():
            positions = rng.integers(0, 200, 200)
            on_cpu.set_row(request_id, positions)
            on_gpu.set_row(request_id, positions)
        table = torch.from_numpy(rng.integers(0, 10**6, (1, 64, 2, 200)).astype(np.int32))
        ids = rng.permutation(128)[:48].tolist()
        with torch.cuda.stream(stream):
            on_device = table.pin_memory().to("cuda", non_blocking=True)
            on_gpu.gather(on_device, ids)
        on_cpu.gather(table, ids)
        stream.synchronize()
        assert torch.equal(on_device.cpu(), table)


def run_python(folder: Path, code: str, **variables: str) -> subprocess.CompletedProcess:
    """A new interpreter of this environment, with ``folder`` in front of its path."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRTLLM_MEMSHARE")}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT)])
    program = folder / "program.py"
    program.write_text(textwrap.dedent(code))
    return subprocess.run(
        [sys.executable, str(program)], env={**environment, **variables}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


REPORT = """
    import sys
    from tensorrt_llm._torch.pyexecutor import _util
    print(_util.get_kv_cache_manager_cls.__module__, "torch" in sys.modules)
    """


def test_off_changes_and_imports_nothing(installed):
    code = "import sys\nassert not [m for m in sys.modules if m.startswith('trtllm_memshare')]\n" + textwrap.dedent(
        REPORT
    )
    for variables in ({}, {"TRTLLM_MEMSHARE_ENABLE": "0"}):
        done = run_python(installed, code, **variables)
        assert done.stdout.split() == ["tensorrt_llm._torch.pyexecutor._util", "False"], done.stderr


def test_on_is_installed_when_tensorrt_llm_is_imported(installed):
    done = run_python(installed, REPORT, TRTLLM_MEMSHARE_ENABLE="1")
    assert done.stdout.split()[0] == "trtllm_memshare.trtllm.pytorch.probe", done.stderr
    assert "MemShare found the KV cache manager in its form V1" in done.stderr


TRY_AGAIN = """
    import sys
    try:
        from tensorrt_llm._torch.pyexecutor import _util
    except Exception as error:
        print(type(error).__name__)
    repair()
    from tensorrt_llm._torch.pyexecutor import _util
    left = [finder for finder in sys.meta_path if "memshare" in type(finder).__module__]
    print(_util.get_kv_cache_manager_cls.__module__, len(left))
    """


@pytest.mark.parametrize("is_ours", [True, False])
def test_an_import_that_failed_and_is_tried_again_shares(installed, is_ours):
    """It may have failed for want of another library, or for a wrong setting."""
    (installed / "ready").write_text("")
    module = installed / "tensorrt_llm" / "_torch" / "pyexecutor" / "_util.py"
    ready = installed / ("none" if not is_ours else "ready")
    module.write_text(f"import os\nif not os.path.exists({str(ready)!r}): raise OSError\n" + module.read_text())
    settings = installed / "settings.json"
    settings.write_text('{"preset": "none"}' if is_ours else "{}")
    repair = f"def repair():\n    open({str(settings)!r}, 'w').write('{{}}')\n    open({str(ready)!r}, 'w').close()\n"
    variables = {"TRTLLM_MEMSHARE_ENABLE": "1", "TRTLLM_MEMSHARE_CONFIG": str(settings)}
    done = run_python(installed, repair + textwrap.dedent(TRY_AGAIN), **variables)
    failed = "UserError" if is_ours else "OSError"
    assert done.stdout.split() == [failed, "trtllm_memshare.trtllm.pytorch.probe", "0"], done.stderr


def test_a_program_without_tensorrt_llm_is_left_alone(installed):
    done = run_python(installed, "import sys; print('torch' in sys.modules)", TRTLLM_MEMSHARE_ENABLE="1")
    assert done.stdout.split() == ["False"], done.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TRTLLM_MEMSHARE_ENABLE": "yes"}, "TRTLLM_MEMSHARE_ENABLE must be 0 or 1, got 'yes'"),
        ({"TRTLLM_MEMSHARE_ENABLE": "1", "TRTLLM_MEMSHARE_CONFG": "x"}, "did you mean TRTLLM_MEMSHARE_CONFIG?"),
        (
            {"TRTLLM_MEMSHARE_ENABLE": "1", "TRTLLM_MEMSHARE_CONFIG": "/none.json"},
            "TRTLLM_MEMSHARE_CONFIG cannot be read: /none.json",
        ),
    ],
)
def test_a_wrong_variable_stops_tensorrt_llm_and_nothing_else(installed, variables, message):
    done = run_python(installed, REPORT, **variables)
    assert done.returncode != 0
    assert message in done.stderr.splitlines()[-1]
    assert run_python(installed, "print('fine')", **variables).stdout == "fine\n"


def test_spawned_workers_have_it_too(installed):
    """As MPI workers do, a spawned process reads the site folder again."""
    code = """
        import multiprocessing

        def selected(_):
            from tensorrt_llm._torch.pyexecutor import _util
            return _util.get_kv_cache_manager_cls.__module__

        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(*pool.map(selected, [0]))
        """
    done = run_python(installed, code, TRTLLM_MEMSHARE_ENABLE="1")
    assert done.stdout.split() == ["trtllm_memshare.trtllm.pytorch.probe"], done.stderr


def test_the_built_wheel_puts_the_file_into_site_packages(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build")],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "build" / "lib" / "trtllm_memshare_activation.pth").is_file()


def test_the_options_file_goes_behind_the_subcommand():
    assert place_option("serve", ["MODEL", "--port", "8001"], "F") == [
        "MODEL", "--port", "8001", "--extra_llm_api_options", "F",
    ]  # fmt: skip
    assert place_option("bench", ["-m", "M", "throughput", "--eos_id", "2"], "F") == [
        "-m", "M", "throughput", "--extra_llm_api_options", "F", "--scheduler_policy", "max_utilization", "--eos_id",
        "2",
    ]  # fmt: skip
    with pytest.raises(UserError, match="needs the subcommand throughput or latency"):
        place_option("bench", ["-m", "M", "build", "--eos_id=2"], "F")
    with pytest.raises(UserError, match="--scheduler_policy must be max_utilization to share, got guaranteed_no_evict"):
        place_option("bench", ["throughput", "--eos_id", "2", "--scheduler_policy=guaranteed_no_evict"], "F")
    with pytest.raises(UserError, match="bench needs --eos_id"):
        place_option("bench", ["-m", "M", "throughput"], "F")


@pytest.fixture
def fake_program(tmp_path, monkeypatch):
    """Puts a program on PATH that writes down how it was called, and reports as a worker would."""

    def make(name: str) -> Path:
        program, seen = tmp_path / name, tmp_path / "seen.json"
        program.write_text(
            f"#!{sys.executable}\nimport json, os, sys\n"
            "arguments = sys.argv[1:]\n"
            "options = open(arguments[arguments.index('--extra_llm_api_options') + 1]).read()\n"
            "stats = os.environ.get('TRTLLM_MEMSHARE_STATS_FILE')\n"
            "if stats: open(stats, 'w').write('{\"blocks_shared\": 17}')\n"
            "if '--report_json' in arguments:\n"
            "    open(arguments[arguments.index('--report_json') + 1], 'w').write('{\"performance\": {}}')\n"
            f"json.dump([arguments, options, os.environ['TRTLLM_MEMSHARE_ENABLE']], open({str(seen)!r}, 'w'))\n"
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return seen

    return make


def test_serve_runs_trtllm_serve_with_the_settings_and_prints_them(fake_program, capfd, tmp_path):
    seen = fake_program("trtllm-serve")
    user = tmp_path / "user.yaml"
    user.write_text("max_batch_size: 4\n")
    with pytest.raises(SystemExit) as done:
        wrap.main("serve", ["MODEL", "--config", str(user), "--port", "8001"])
    assert done.value.code == 0
    arguments, options, enabled = json.loads(seen.read_text())
    assert arguments[:3] == ["MODEL", "--port", "8001"]
    assert yaml.safe_load(options)["max_batch_size"] == 4
    assert yaml.safe_load(options)["attn_backend"] == "TRTLLM"
    assert enabled == "1"
    printed = capfd.readouterr().out
    assert "memshare: preset aligned" in printed
    assert "MAX_UTILIZATION" in printed
    assert "trtllm-serve MODEL" in printed


def test_bench_merges_our_totals_into_the_report(fake_program, tmp_path):
    fake_program("trtllm-bench")
    report = tmp_path / "report.json"
    with pytest.raises(SystemExit):
        wrap.main("bench", ["-m", "M", "throughput", "--eos_id", "2", "--report_json", str(report)])
    assert json.loads(report.read_text()) == {"performance": {}, "memshare": {"blocks_shared": 17}}


def test_a_missing_program_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="trtllm-serve is not on PATH"):
        wrap.main("serve", ["MODEL"])
