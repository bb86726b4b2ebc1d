"""What the plugin was not made for is refused by name."""

from types import SimpleNamespace

import pytest

from trtllm_memshare.errors import UserError
from trtllm_memshare.vllm import SCHEDULER_CLASS, WORKER_CLASS, plugin
from trtllm_memshare.vllm.plugin import choose_classes
from trtllm_memshare.vllm.probe import check_aliases, check_classes, check_release, check_scheduler


def scheduler_class(*missing):
    names = {"schedule", "add_request", "update_from_output", "_preempt_request", "_free_request", "make_stats"}
    return type("Scheduler", (), {name: lambda self: None for name in names - set(missing)})


class KVCacheManager:
    def allocate_slots(self, request, num_new_tokens, more=0): ...


class BlockPool:
    def get_new_blocks(self): ...
    def free_blocks(self): ...
    def touch(self): ...
    def evict_blocks(self): ...
    def get_num_free_blocks(self): ...


def test_a_vllm_without_what_is_built_on_is_refused():
    check_classes("0.32.0", scheduler_class(), KVCacheManager, BlockPool)
    with pytest.raises(UserError, match=r"vLLM 0.40 has no Scheduler._preempt_request.*tested with vLLM 0.32"):
        check_classes("0.40", scheduler_class("_preempt_request"), KVCacheManager, BlockPool)
    other = type("KVCacheManager", (), {"allocate_slots": lambda self, tokens, request: None})
    with pytest.raises(UserError, match="must take request and num_new_tokens, got tokens, request"):
        check_classes("0.40", scheduler_class(), other, BlockPool)


def a_scheduler(kinds=("FullAttentionSpec",), connector=None, refused=(), **changes):
    values = {
        "speculative_config": None, "diffusion_config": None, "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, "cache_dtype": "auto",
        "enable_sleep_mode": False, "sliding_window": None, **changes,
    }  # fmt: skip
    parts = SimpleNamespace(**values)
    config = SimpleNamespace(
        speculative_config=parts.speculative_config,
        diffusion_config=parts.diffusion_config,
        parallel_config=parts,
        cache_config=parts,
        model_config=parts,
    )
    groups = [SimpleNamespace(kv_cache_spec=type(k, (), {"sliding_window": parts.sliding_window})()) for k in kinds]
    group = SimpleNamespace(req_to_blocks={}, num_cached_block={}, block_size=16)
    return SimpleNamespace(
        vllm_config=config, kv_cache_config=SimpleNamespace(kv_cache_groups=groups), connector=connector,
        is_encoder_decoder=False, grammar_compile_error_reqs=None if refused is None else set(),
        kv_cache_manager=SimpleNamespace(coordinator=SimpleNamespace(single_type_managers=[group])),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": ("FullAttentionSpec", "CrossAttentionSpec")}, "got KV cache groups of FullAttentionSpec, CrossAtt"),
        ({"sliding_window": 128}, "excludes sliding_window, got 128"),
        ({"speculative_config": object()}, "excludes speculative decoding with vLLM"),
        ({"diffusion_config": object()}, "excludes a diffusion language model with vLLM"),
        ({"connector": object()}, "excludes KV transfer"),
        ({"pipeline_parallel_size": 2}, "excludes pipeline parallelism"),
        ({"decode_context_parallel_size": 2}, "excludes decode context parallelism"),
        ({"cache_dtype": "fp8_e5m2"}, "excludes a KV cache of fp8_e5m2"),
        ({"enable_sleep_mode": True}, "excludes sleep mode"),
        ({"use_ubatching": True}, "excludes dual batch overlap"),
        ({"enable_elastic_ep": True}, "excludes elastic expert parallelism"),
        ({"world_size": 2, "distributed_executor_backend": "external_launcher"}, "excludes the executor external_laun"),
        ({"refused": None}, "has no grammar_compile_error_reqs, by which MemShare ends a request"),
    ],
)
def test_features_that_are_excluded_are_named(changes, message):
    check_scheduler(a_scheduler(), "0.32.0")
    check_scheduler(a_scheduler(world_size=1, distributed_executor_backend="external_launcher"), "0.32.0")
    check_scheduler(a_scheduler(world_size=2, distributed_executor_backend="mp"), "0.32.0")
    with pytest.raises(UserError, match=message):
        check_scheduler(a_scheduler(**changes), "0.32.0")


def test_older_releases_are_refused_and_newer_ones_served_with_a_warning():
    assert all(map(check_release, ("0.32.0", "0.33.1", "0.33.0+cpu", "0.32.2rc1.dev5+g4ba787ec9")))
    assert not any(map(check_release, ("0.34.0", "1.0.0", "0.34.0rc1", "0.1.dev1+g4ba787ec9", "0.12.dev3", "dev", "")))
    for older in ("0.31.2", "0.9.0.1", "0.30.0+cpu", "0.31.1rc1.dev5+g1"):
        with pytest.raises(UserError, match=r"needs vLLM 0\.32 or later, got 0"):
            check_release(older)


def test_what_is_read_of_each_group_s_manager_is_looked_for():
    """A state has no window, and both have blocks that a request takes at most."""
    scheduler = a_scheduler(("FullAttentionSpec", "SlidingWindowSpec", "MambaSpec"), mamba_cache_mode="none")
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    more = {
        "SlidingWindowManager": {"sliding_window": 64},
        "MambaManager": {"mamba_cache_mode": "none", "kv_cache_spec": None},
    }
    for kind, attributes in more.items():
        known = {**vars(managers[0]), "max_admission_blocks_per_request": 5, **attributes}
        managers.append(type(kind, (), known)())
    assert check_scheduler(scheduler, "0.32.0") == 0
    for manager, name in (("SlidingWindowManager", "sliding_window"), ("MambaManager", "mamba_cache_mode")):
        kind = next(type(m) for m in managers if type(m).__name__ == manager)
        whole = getattr(kind, name)
        delattr(kind, name)
        with pytest.raises(UserError, match=f"vLLM 0.40's {manager} has no {name}, which MemShare builds on"):
            check_scheduler(scheduler, "0.40")
        setattr(kind, name, whole)
    scheduler.kv_cache_manager.coordinator.enable_partial_hash_hits = True
    with pytest.raises(
        UserError, match="that end with a block, got blocks of states that are longer than those of att"
    ):
        check_scheduler(scheduler, "0.32.0")


def test_the_environment_chooses_the_classes_once():
    class EngineArgs:
        __dataclass_fields__ = {"scheduler_cls": None, "worker_cls": None}  # noqa: RUF012
        scheduler_cls, worker_cls = None, "auto"

        def create_engine_config(self):
            return self.scheduler_cls, self.worker_cls

    choose_classes(EngineArgs)
    choose_classes(EngineArgs)
    assert EngineArgs().create_engine_config() == (SCHEDULER_CLASS, WORKER_CLASS)
    taken = EngineArgs()
    taken.worker_cls = "other.Worker"
    with pytest.raises(UserError, match=r"got scheduler_cls None and worker_cls other.Worker"):
        taken.create_engine_config()
    with pytest.raises(UserError, match="no scheduler_cls and worker_cls"):
        choose_classes(type("EngineArgs", (), {}))


def test_a_server_is_told_when_its_metrics_will_not_have_ours(monkeypatch):
    class EngineArgs:
        __dataclass_fields__ = {"scheduler_cls": None, "worker_cls": None}  # noqa: RUF012
        scheduler_cls, worker_cls = None, "auto"

        def create_engine_config(self, usage_context=None, headless=False):
            return usage_context

    choose_classes(EngineArgs)
    lines, server = [], SimpleNamespace(value="OPENAI_API_SERVER")
    monkeypatch.setattr(plugin.LOG, "warning", lambda line, *values: lines.append(line % values))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    for others in ((), (SimpleNamespace(value="LLM_CLASS"),), (server, True)):
        EngineArgs().create_engine_config(*others)
    assert lines == [], "offline nobody asks for /metrics, and a headless engine has none"
    assert EngineArgs().create_engine_config(usage_context=server) is server
    assert len(lines) == 1
    assert "got no PROMETHEUS_MULTIPROC_DIR (set it to an empty folder" in lines[0]
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "folder")
    EngineArgs().create_engine_config(server)
    assert len(lines) == 1


def a_runner(*backends):
    groups = [SimpleNamespace(backend=SimpleNamespace(get_name=lambda name=name: name)) for name in backends]
    return SimpleNamespace(attn_groups=[groups])


def test_aliases_are_refused_where_attention_reads_a_block_once_for_all_entries_that_name_it():
    check_aliases(a_runner("CPU_ATTN"))
    check_aliases(a_runner("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN"))
    with pytest.raises(UserError, match=r"CPU_ATTN, FLASHINFER, FLASH_ATTN, TRITON_ATTN, got FLEX_ATTENTION \(choose"):
        check_aliases(a_runner("FLASH_ATTN", "FLEX_ATTENTION"))
    for runner in (a_runner(), SimpleNamespace()):
        with pytest.raises(UserError, match="got none"):
            check_aliases(runner)
