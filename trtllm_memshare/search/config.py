"""Settings of the search and of what is done with its results, and the named presets."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from trtllm_memshare.errors import UserError, describe_validation_error, nearest, quote, shorten
from trtllm_memshare.json_input import check_known_keys
from trtllm_memshare.search.pressure import Spread
from trtllm_memshare.search.unread import find_unread

MAX_PAIRS = 4096
"""Most pairs that buffers are made for."""


class MemShareConfig(BaseModel):
    """How blocks are matched, compared, protected and shared. Frozen; lengths in tokens, ratios in [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Literal["off", "pressure", "paper", "aligned", "lexical", "drop-duplicate"] = "aligned"
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
    max_protected_tokens: int = Field(
        256, ge=0, description="most tokens that protected_steps protect: a step that never ends must not hold memory"
    )
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

    pressure: bool = Field(
        False, description="give pages up when the pool runs short, before a request is paused; nothing before that"
    )
    high_watermark: float = Field(0.97, gt=0, le=1, description="pool use that the next step must not pass")
    low_watermark: float = Field(0.92, gt=0, le=1, description="pool use down to which pages are given up then")
    min_kept: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of its generated pages that a request keeps; only pages that stand again go below it",
    )
    lookahead_tokens: int = Field(
        128,
        ge=1,
        description="a waiting request gets in if all can write so many tokens more at their floors",
    )
    need: Literal[
        "redundancy",
        "redundancy-recency",
        "attention-redundancy",
        "attention-redundancy-recency",
        "surprisal-redundancy",
        "surprisal-led-redundancy",
        "surprisal-led-redundancy-recency",
        "attention-surprisal-redundancy",
        "surprisal",
        "age",
        "random",
        "nearest-earlier",
    ] = Field("redundancy", description="how pages are ranked once exact repeats have gone")
    spread: Spread = Field(
        "need", description="who gives first: whose page is needed least, the longest request, or all equally"
    )

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
    control_seed: int = Field(0, ge=0, description="of random pages")

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """``true`` is no number, though it would pass for 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in (int, float):
            raise ValueError(f"must be a number, got {str(value).lower()}")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> MemShareConfig:
        """Settings of which one alone says too little."""
        if self.low_watermark > self.high_watermark:
            raise ValueError(
                f"low_watermark must not be above high_watermark, got {self.low_watermark} and {self.high_watermark}"
            )
        if self.pressure != (self.preset == "pressure"):
            raise ValueError(
                f"pressure belongs to the preset pressure, got pressure {self.pressure} with preset {self.preset} "
                f"(choose --preset pressure)"
            )
        if self.pressure and self.retired_becomes == "alias" and self.need != "nearest-earlier":
            raise ValueError(
                f"under pressure need nearest-earlier alone names a page to stand in for one that is given up, got "
                f"retired_becomes alias with need {self.need} (choose null or dropped, or need nearest-earlier)"
            )
        repeats = {"matcher": "runs", "max_gap_tokens": 0, "direction": "keep-latest"}
        if self.pressure and (
            other := [f"{n} {getattr(self, n)}" for n, v in repeats.items() if getattr(self, n) != v]
        ):
            raise ValueError(
                f"under pressure pages go below a floor if their text stands again, word for word and later, which "
                f"needs matcher runs, max_gap_tokens 0 and direction keep-latest, got {', '.join(other)} (leave it out)"
            )
        if (unread := find_unread(self)) is not None:
            name, reader = unread
            raise ValueError(
                f"{name} {getattr(self, name)} has no effect beside the other settings, got it with preset "
                f"{self.preset}: {reader} (leave it out)"
            )
        return self

    @property
    def shares(self) -> bool:
        """True when decisions change block tables."""
        return self.preset != "off" and not self.shadow

    @property
    def forgets(self) -> bool:
        """True when entries come to point at null pages: all retired ones, or under pressure those without a donor."""
        return self.shares and (self.retired_becomes == "null" or (self.pressure and self.retired_becomes == "alias"))

    @property
    def searches(self) -> bool:
        """True when pairs of blocks are looked for while there is room in the pool."""
        return self.preset not in ("off", "pressure")

    @property
    def matches(self) -> bool:
        """True when stage 1 keeps the tokens of each request."""
        return self.preset != "off"


PRESETS: dict[str, dict[str, Any]] = {
    "off": {"preset": "off"},
    # As in the study of what real models can do without (docs/real_model.md): the last 128 tokens stay, and of the
    # rankings that need no attention this one is better than random pages for the next word and for what was said once.
    "pressure": {
        "preset": "pressure",
        "pressure": True,
        "need": "surprisal-led-redundancy-recency",
        "retired_becomes": "null",
        "protected_tokens": 128,
        "protected_steps": 0,
    },
    # Our reconstruction: the paper's thresholds and alignment are not public (docs/method.md).
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


HOST_NEED = "redundancy"
"""Under pressure, where the host does not tell how likely its tokens were."""


def make_config(preset: str, **overrides: Any) -> MemShareConfig:
    """The settings of ``preset`` with ``overrides`` on top.

    Raises:
      UserError: unknown preset or key (the nearest known one is named), or a value out of range.
    """
    if not isinstance(preset, str) or preset not in PRESETS:
        named = preset if isinstance(preset, str) else quote(preset)
        raise UserError(f"unknown preset {shorten(named)} ({nearest(named, PRESETS)})")
    return parse_config({**PRESETS[preset], **overrides}, "memshare settings")


def parse_config(values: dict[str, Any], where: str) -> MemShareConfig:
    """Validates a dictionary, e.g. the ``memshare`` part of ``memshare.json``; ``where`` names it in errors."""
    if isinstance(values, dict):
        check_known_keys(values, tuple(MemShareConfig.model_fields), where)
    try:
        return MemShareConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(describe_validation_error(error, MemShareConfig.model_fields, where)) from error


def check_for_executor(config: MemShareConfig) -> None:
    """Raises UserError for settings of pressure that an engine of ours cannot carry out or does not read."""
    refuse_shadow(config)
    if config.pressure and config.search_interval != MemShareConfig.model_fields["search_interval"].default:
        raise UserError(
            f"search_interval is not read under pressure, which looks at every step, got {config.search_interval} "
            f"(leave it out)"
        )


def refuse_shadow(config: MemShareConfig) -> None:
    """Raises UserError for pressure in shadow, of a host that would have to give pages up to know which go."""
    if config.pressure and config.shadow:
        raise UserError(
            "shadow changes nothing, and what pressure would give up is not counted here, got both (take preset "
            "aligned for shadow, or leave out shadow)"
        )
