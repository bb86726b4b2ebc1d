"""Settings of the search and of what is done with its results, and the named presets."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trtllm_memshare.errors import UserError, describe_validation_error, nearest

MAX_PAIRS = 4096
"""Most pairs that buffers are made for."""


class MemShareConfig(BaseModel):
    """How blocks are matched, compared, protected and shared. Frozen; lengths in tokens, ratios in [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Literal["off", "paper", "aligned", "lexical", "drop-duplicate"] = "aligned"
    shadow: bool = Field(False, description="search and report, share nothing")

    direction: Literal["keep-latest", "keep-earliest"] = Field(
        "keep-latest", description="which copy of a repeat stays: the newer block, or the older one as in the paper"
    )
    matcher: Literal["runs", "steps"] = Field(
        "runs", description="stage 1: token runs at any shift, or bag-of-tokens cosine between whole steps"
    )
    shingle_tokens: int = Field(12, ge=2, le=64, description="tokens that must agree before a run is considered")
    min_run_tokens: int = Field(32, ge=2, description="shortest run of which a block may be shared")
    max_gap_tokens: int = Field(0, ge=0, le=8, description="differing tokens a run may bridge at one place")
    min_step_tokens: int = Field(10, ge=1, description="shortest step the step matcher looks at")
    min_step_cosine: float = Field(0.8, ge=0, le=1, description="step matcher: smallest cosine of two steps")
    max_steps_compared: int = Field(256, ge=1, description="step matcher: how many earlier steps are looked at")

    accept_all: bool = Field(False, description="skip stage 2: every lexical candidate counts as equal")
    undo_rope: bool = Field(True, description="compare K after undoing the rotation between the two positions")
    max_distance: float = Field(0.5, ge=0, description="largest relative distance, summed along a chain of copies")
    pool_layers: bool = Field(
        False, description="one distance over K and V of all layers, as in the paper, instead of a vote of the layers"
    )
    compared: Literal["k-and-v", "k", "v"] = Field("k-and-v", description="what a layer's distance is taken on")
    layer_vote: Literal["quorum", "mean"] = Field(
        "quorum", description="quorum: so many layers must lie within max_distance; mean: the mean over layers must"
    )
    layer_quorum: float = Field(1.0, gt=0, le=1, description="share of layers that must lie within max_distance")

    protected_tokens: int = Field(64, ge=0, description="most recent tokens that are never retired")
    protected_steps: int = Field(2, ge=0, description="most recent whole steps that are never retired")
    settled_tokens: int = Field(
        0, ge=0, description="tokens written after a copy before the block it replaces is given up"
    )
    count_aliases: bool = Field(
        True, description="a block that a table names m times weighs m times in attention; False: once, as if dropped"
    )
    min_pool_use: float = Field(0.0, ge=0, le=1, description="share only while this much of the pool is in use")
    max_aliases: int = Field(8, ge=2, description="most entries of one request's table that may point at one block")
    retired_becomes: Literal["null", "alias", "dropped"] = Field(
        "alias",
        description="entry of a retired page: the null page (forgotten), the page that stands in for it (as in the "
        "paper), or nothing (runners that skip entries)",
    )
    read_null: bool = Field(
        False, description="read null entries where the runner could skip them: the same result for more work"
    )
    scope: Literal["request", "group"] = Field("request", description="group: donors of other samples of one prompt")
    search_interval: int = Field(6, ge=1, description="decode steps between two searches")
    max_pairs: int = Field(64, ge=1, le=MAX_PAIRS, description="most candidate pairs compared in one search")

    control: Literal["none", "random", "streaming", "snapkv", "rkv"] = Field(
        "none", description="an experiment's control in place of sharing; never meant for serving"
    )
    streaming_window_tokens: int = Field(512, ge=1, description="control streaming: recent tokens kept")
    streaming_sink_tokens: int = Field(16, ge=0, description="control streaming: first tokens kept beside the prompt")
    budget_tokens: int = Field(512, ge=1, description="controls snapkv and rkv: generated tokens kept in full blocks")
    budget: Literal["fixed", "share"] = Field(
        "fixed", description="controls snapkv and rkv: budget_tokens, or budget_share of what was generated so far"
    )
    budget_share: float = Field(0.5, gt=0, le=1, description="controls snapkv and rkv: see budget")
    observation_tokens: int = Field(8, ge=1, le=128, description="controls snapkv and rkv: recent queries that score")
    control_seed: int = 0

    @property
    def shares(self) -> bool:
        """True when decisions change block tables."""
        return self.preset != "off" and not self.shadow

    @property
    def searches(self) -> bool:
        return self.preset != "off"


PRESETS: dict[str, dict[str, Any]] = {
    "off": {"preset": "off"},
    # Our reconstruction: the paper's thresholds and alignment are not public (DESIGN section 4).
    "paper": {
        "preset": "paper",
        "direction": "keep-earliest",
        "matcher": "steps",
        "undo_rope": False,
        "pool_layers": True,
        "max_distance": 0.9,
    },
    "aligned": {"preset": "aligned"},
    "lexical": {"preset": "lexical", "accept_all": True},
    # Needs a runner that reads a block once however often a table names it: the torch runner does.
    "drop-duplicate": {"preset": "drop-duplicate", "count_aliases": False},
}


def make_config(preset: str, **overrides: Any) -> MemShareConfig:
    """The settings of ``preset`` with ``overrides`` on top.

    Raises:
      UserError: unknown preset or key (the nearest known one is named), or a value out of range.
    """
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset} ({nearest(preset, PRESETS)})")
    return parse_config({**PRESETS[preset], **overrides}, "memshare settings")


def parse_config(values: dict[str, Any], where: str) -> MemShareConfig:
    """Validates a dictionary, e.g. the ``memshare`` part of ``memshare.json``; ``where`` names it in errors."""
    try:
        return MemShareConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(describe_validation_error(error, MemShareConfig.model_fields, where)) from error
