"""A setting that nothing reads beside the others is refused, with who would read it."""

import pytest

from trtllm_memshare.errors import UserError
from trtllm_memshare.search.config import MemShareConfig, make_config


@pytest.mark.parametrize(
    ("preset", "settings", "name", "reader"),
    [
        ("aligned", {"need": "age"}, "need age", "preset pressure reads it"),
        ("aligned", {"min_kept": 0.1}, "min_kept 0.1", "preset pressure"),
        ("paper", {"high_watermark": 0.99}, "high_watermark 0.99", "preset pressure"),
        ("pressure", {"min_pool_use": 0.5}, "min_pool_use 0.5", "presets that search while there is room"),
        ("pressure", {"max_distance": 0.1}, "max_distance 0.1", "presets that compare K and V"),
        ("lexical", {"max_distance": 0.1}, "max_distance 0.1", "presets that compare K and V"),
        ("lexical", {"undo_rope": False}, "undo_rope False", "presets that compare K and V"),
        ("paper", {"min_run_tokens": 500}, "min_run_tokens 500", "matcher runs"),
        ("aligned", {"min_step_cosine": 0.9}, "min_step_cosine 0.9", "matcher steps"),
        ("aligned", {"layer_vote": "mean", "layer_quorum": 0.3}, "layer_quorum 0.3", "layer_vote quorum"),
        ("pressure", {"max_protected_tokens": 100}, "max_protected_tokens 100", "protected_steps above 0"),
        ("pressure", {"scope": "group"}, "scope group", "presets that search while there is room"),
        ("pressure", {"control": "snapkv"}, "control snapkv", "presets that search while there is room"),
        ("pressure", {"max_aliases": 4}, "max_aliases 4", "need nearest-earlier"),
        ("pressure", {"count_aliases": False}, "count_aliases False", "need nearest-earlier"),
        (
            "pressure",
            {"need": "nearest-earlier", "retired_becomes": "null", "count_aliases": False},
            "count_aliases False",
            "retired_becomes alias",
        ),
        ("pressure", {"need": "nearest-earlier", "min_run_tokens": 64}, "min_run_tokens 64", "exact repeats first"),
        ("pressure", {"need": "nearest-earlier", "shingle_tokens": 8}, "shingle_tokens 8", "exact repeats first"),
        ("aligned", {"read_null": True}, "read_null True", "null entries read it"),
        ("pressure", {"retired_becomes": "dropped", "read_null": True}, "read_null True", "null entries read it"),
        ("pressure", {"control_seed": 3}, "control_seed 3", "need random"),
        ("aligned", {"control_seed": 3}, "control_seed 3", "control random"),
        ("aligned", {"streaming_sink_tokens": 4}, "streaming_sink_tokens 4", "control streaming"),
        ("aligned", {"budget_tokens": 4}, "budget_tokens 4", "budget fixed"),
        ("aligned", {"control": "rkv", "budget_share": 0.3}, "budget_share 0.3", "budget share"),
    ],
)
def test_what_has_no_effect_is_refused(preset, settings, name, reader):
    with pytest.raises(UserError) as error:
        make_config(preset, **settings)
    assert f"{name} has no effect" in str(error.value)
    assert f"preset {preset}" in str(error.value)
    assert reader in str(error.value)


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("pressure", {"need": "age", "min_kept": 0.1, "low_watermark": 0.5}),
        ("pressure", {"need": "nearest-earlier", "retired_becomes": "alias", "max_aliases": 4}),
        ("pressure", {"need": "nearest-earlier", "max_aliases": 4}),
        ("pressure", {"need": "nearest-earlier", "retired_becomes": "alias", "count_aliases": False}),
        ("pressure", {"need": "nearest-earlier", "retired_becomes": "alias", "read_null": True}),
        ("pressure", {"need": "random", "control_seed": 3}),
        ("pressure", {"min_run_tokens": 64, "shingle_tokens": 8, "read_null": True}),
        ("aligned", {"retired_becomes": "null", "read_null": True}),
        ("aligned", {"control": "random", "control_seed": 3}),
        ("paper", {"min_step_cosine": 0.9, "max_distance": 0.1}),
        ("paper", {"scope": "group", "min_run_tokens": 64}),
        ("lexical", {"min_run_tokens": 64, "settled_tokens": 8}),
        ("aligned", {"protected_steps": 1, "max_protected_tokens": 100}),
        ("aligned", {"control": "rkv", "budget": "share", "budget_share": 0.3}),
        ("aligned", {"need": MemShareConfig.model_fields["need"].default}),
    ],
)
def test_what_is_read_is_taken(preset, settings):
    config = make_config(preset, **settings)
    assert {name: getattr(config, name) for name in settings} == settings


def test_the_off_switch_may_be_laid_over_any_settings():
    assert make_config("off", min_kept=0.1, max_distance=0.1, min_step_cosine=0.9).preset == "off"
