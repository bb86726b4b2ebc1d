"""Whether null pages were calibrated on the weights that are served: of another model their shape may be right too."""

from __future__ import annotations

import logging
from pathlib import Path

from trtllm_memshare.engine.null_page_files import calibrated_on
from trtllm_memshare.engine.weights import weights_digest
from trtllm_memshare.errors import UserError

log = logging.getLogger(__name__)

_AGAIN = "calibrate the model again"


def check_weights(path: Path, model: str, model_dir: Path | None) -> None:
    """Holds a file of null pages against a model's weights; where one of the two is not known, a warning says so.

    Args:
      path: of the null pages.
      model: as the user named it.
      model_dir: its files, None if they are not known.

    Raises:
      UserError: they were calibrated on other weights, or the file is damaged.
    """
    expected = calibrated_on(path, _AGAIN)
    if expected is None:
        reason = "it does not say on which it was calibrated"
    elif model_dir is None:
        reason = f"no folder with the weights of {model} is found"
    else:
        try:
            found = weights_digest(model_dir)
        except (UserError, OSError) as error:
            reason = str(error)
        else:
            if found != expected:
                raise UserError(
                    f"{path} must be calibrated on the weights of {model}, got null pages of other weights (calibrate "
                    f"this model, from the very files that are served)"
                )
            return
    log.warning(
        "%s is not held against the weights of %s, since %s; null pages of another model of this shape turn text to "
        "garbage under pressure (calibrate again if in doubt)", path, model, reason,
    )  # fmt: skip


def find_weights(model: str, revision: str | None = None, cache_dir: str | None = None) -> Path | None:
    """The folder of a served model: itself, or what was downloaded of a hub's; nothing is fetched."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=cache_dir, local_files_only=True))
    except (OSError, ValueError):  # not there, or no name of a hub's
        return None
