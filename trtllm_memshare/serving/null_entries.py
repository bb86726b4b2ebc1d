"""What retired pages become, settled between the settings and what a runner can do."""

from __future__ import annotations

from trtllm_memshare.cache.null_pages import NullPages
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.protocol import ForgettingRunner, Runner
from trtllm_memshare.search.config import MemShareConfig


def settle_null_entries(config: MemShareConfig, runner: Runner) -> tuple[MemShareConfig, NullPages | None]:
    """The settings that the cache follows, and the runner's null pages, which no request may be given.

    Where nothing can be forgotten their blocks are like any others, and None is returned for them. On a runner that
    skips entries, entries without a block are forgotten like entries at a null page. So where it has none,
    ``retired_becomes: null`` is carried out as ``dropped``: the same tokens.

    Raises:
      UserError: entries cannot become null or be dropped on this runner.
    """
    null_pages = runner.null_pages if config.forgets and isinstance(runner, ForgettingRunner) else None
    skips = isinstance(runner, ForgettingRunner) and runner.skips_entries
    if config.retired_becomes == "dropped" and not skips and config.shares:
        raise UserError(
            "retired_becomes dropped needs a runner that skips entries, got one that reads them all (set it to null or "
            "alias, or run on an engine of --backend torch)"
        )
    if config.retired_becomes == "null" and null_pages is None and config.shares:
        if not skips or config.read_null:
            raise UserError(
                "retired_becomes null needs an engine with null pages, got one without (build it again with --memshare "
                "and this setting, or set retired_becomes to alias)"
            )
        config = config.model_copy(update={"retired_becomes": "dropped"})
    if config.pressure and config.retired_becomes == "alias" and null_pages is None and not skips:
        raise UserError(
            "under pressure a page that finds no donor is forgotten, which needs an engine with null pages, got one "
            "without, whose runner reads every entry (build it again with --memshare and these settings)"
        )
    if isinstance(runner, ForgettingRunner):
        runner.reserve_null_pages(null_pages is not None)
    return config, null_pages
