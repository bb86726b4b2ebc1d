"""Tables of names and sizes in pages are those of the code: sizing, containers, settings, metrics, contracts."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from trtllm_memshare.engine.build_config import BuildConfig
from trtllm_memshare.search.config import make_config
from trtllm_memshare.trtllm.engine.signatures import BUILDER, PARALLEL

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = (ROOT / "docs" / "deploy.md").read_text()


def test_the_sizing_table_counts_the_bytes_of_keys_and_values():
    rows = re.findall(
        r"^\| (\S.*?) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", DEPLOY, flags=re.MULTILINE
    )
    by_model = {name: [int(cell) for cell in cells] for name, *cells in rows}
    # Llama 8B: 32 layers of 8 heads of 128, K and V, 2 bytes; 10 GiB hold 81,920 tokens, which is 20 times 4,096.
    assert by_model["DeepSeek-R1-Distill-Llama-8B"][:2] == [128, 20]
    for kib, full, three_quarters, half, *larger in by_model.values():
        assert full == 10 * 2**20 // (kib * 4096) <= three_quarters <= half <= 2 * full
        assert larger[0] == 40 * 2**20 // (kib * 4096)


def test_options_in_the_deployment_page_exist():
    scripts = "".join(p.read_text() for p in (ROOT / "build_scripts").glob("*.py"))
    scripts += "".join(p.read_text() for p in (ROOT / "trtllm_memshare" / "commands").glob("*.py"))
    for name in ("launch", "probe", "openai_serve"):
        scripts += (ROOT / "trtllm_memshare" / "triton" / f"{name}.py").read_text()
    scripts += (ROOT / "benchmarks" / "triton_serving.py").read_text()
    for option in re.findall(r"`(--[a-z-]+)`", DEPLOY):
        name = option.removeprefix("--no-").removeprefix("--")
        assert name in scripts or name.replace("-", "_") in scripts, option


def test_the_container_files_are_well_formed_and_take_the_image_from_outside():
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    assert compose["services"]["triton"]["image"].startswith("${TRITON_IMAGE")
    assert all(p.startswith("127.0.0.1:") for p in compose["services"]["triton"]["ports"])
    deployment, service, policy = yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text())
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
    pod = deployment["spec"]["template"]["spec"]
    probes = [container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")]
    assert container["startupProbe"]["exec"] == container["readinessProbe"]["exec"]
    probes += [{"exec": {"command": compose["services"]["triton"]["healthcheck"]["test"][1:]}}]
    for probe in probes:  # Triton's own endpoints stay green over a dead model process
        assert probe["exec"]["command"][:3] == ["python3", "-m", "trtllm_memshare.triton.probe"]
    drain = next(int(a.partition("=")[2]) for a in container["command"] if a.startswith("--drain-seconds"))
    assert drain + 10 < pod["terminationGracePeriodSeconds"]
    start, live = (container[f"{kind}Probe"] for kind in ("startup", "liveness"))
    # The launcher starts a server anew inside the container, which must not be ended meanwhile.
    assert live["periodSeconds"] * live["failureThreshold"] >= start["periodSeconds"] * start["failureThreshold"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert policy["kind"] == "NetworkPolicy"
    assert policy["spec"]["podSelector"] == deployment["spec"]["selector"]
    ports = {p["name"] for p in container["ports"]}
    by_whom = {p["port"]: rule["from"] for rule in policy["spec"]["ingress"] for p in rule["ports"]}
    assert set(by_whom) == ports
    assert all("podSelector" in by_whom[name][0] for name in ports - {"metrics"})
    assert compose["services"]["triton"]["restart"]
    assert deployment["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"] == "8002"
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]


PYTORCH = "".join((ROOT / "docs" / name).read_text() for name in ("pytorch_backend.md", "pytorch_backend_figures.md"))


def test_the_pages_of_the_pytorch_backend_name_what_exists():
    from trtllm_memshare.trtllm.pytorch.metrics import _COUNTERS
    from trtllm_memshare.trtllm.pytorch.names import TABLE
    from trtllm_memshare.trtllm.pytorch.settings import VARIABLES, AdapterOptions

    assert set(re.findall(r"`(TRTLLM_MEMSHARE_\w+)`", PYTORCH)) == set(VARIABLES)
    for name in AdapterOptions.model_fields:
        assert f"`{name}`" in PYTORCH
    counters = {f"memshare_{name}_total" for name in _COUNTERS}
    assert counters <= set(re.findall(r"`(memshare_\w+)", PYTORCH))
    for name in {n.name for n in TABLE}:
        assert f"`{name}" in PYTORCH or f".{name}" in PYTORCH, name


def test_the_page_on_tensorrt_llm_names_what_is_used_and_what_exists():
    page = (ROOT / "docs" / "tensorrt_llm.md").read_text()
    for entry in (*BUILDER, *PARALLEL):
        assert f"`{entry.module}.{entry.name}`" in page, entry.name
    scripts = "".join(p.read_text() for p in (ROOT / "build_scripts").glob("*.py"))
    scripts += "".join(p.read_text() for p in (ROOT / "trtllm_memshare" / "commands").glob("*.py"))
    for option in ("--dry-run", "--search-engine", "--quantization", "--kv-cache-dtype", "--tp-size", "--pp-size"):
        assert option in page
        assert option in scripts or option[2:].replace("-", "_") in BuildConfig.model_fields


def test_a_file_of_the_product_has_at_most_300_lines():
    files = list((ROOT / "trtllm_memshare").rglob("*.py"))
    assert files
    assert not {p.relative_to(ROOT).as_posix(): n for p in files if (n := len(p.read_text().splitlines())) > 300}


def test_the_settings_of_pressure_have_the_defaults_that_their_table_says():
    page = (ROOT / "docs" / "pressure.md").read_text()
    part = page.partition("### Settings")[2].partition("Other needs are")[0]
    config, found = make_config("pressure"), {}
    for names, values in re.findall(r"^\| (`.*?`) \| (.*?) \|", part, flags=re.MULTILINE):
        found.update(zip(re.findall(r"`(\w+)`", names), values.replace("`", "").split(", "), strict=True))
    assert {name: str(getattr(config, name)).lower() for name in found} == found
    assert {"min_kept", "need", "retired_becomes", "lookahead_tokens"} <= set(found)
