"""Loads the model of a checkpoint, under either transformers, whatever prefix its stored names carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtllm_memshare.engine.skeleton import describe
from trtllm_memshare.engine.tensors import find_prefix
from trtllm_memshare.engine.weights import stored_tensors, weight_files
from trtllm_memshare.errors import UserError


def load_decoder(model_dir: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model, in its own dtype unless ``options`` name one, and what transformers reports of the loading.

    Args:
      model_dir: a checkpoint that ``read_checkpoint`` accepts.
      options: for ``from_pretrained``, such as ``attn_implementation`` or ``dtype``.

    Raises:
      UserError: transformers does not load it, which can be for a file that nothing else reads.
    """
    try:
        model, report = _load(model_dir, options)
    except UserError:
        raise
    except Exception as error:  # whatever a foreign library makes of a foreign file
        raise UserError(
            f"{model_dir} does not load: {describe(error)} (copy the model's own files again, or install another "
            f"transformers)"
        ) from error
    model.config.return_dict = True  # a config may ask for tuples
    return model, report


def check_loaded(model_dir: Path, report: dict[str, Any], remedy: str) -> None:
    """Raises UserError if ``load_decoder`` reports weights that transformers filled with random numbers."""
    lost = sorted([*report["missing_keys"], *report["mismatched_keys"]], key=str)
    if lost:
        raise UserError(f"{model_dir} lacks weights of the model, such as {lost[0]} ({remedy})")


def _load(model_dir: Path, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    import transformers
    from safetensors.torch import load_file

    options = {"dtype": "auto", **options, "trust_remote_code": False, "output_loading_info": True}
    prefix = find_prefix(list(stored_tensors(model_dir)))
    if prefix is None:
        return transformers.AutoModelForCausalLM.from_pretrained(
            model_dir, use_safetensors=True, local_files_only=True, **options
        )
    # Not by ``key_mapping``: 4.57 takes a prefix that it does not know for the mark of a model without output layer.
    config = transformers.AutoConfig.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True)
    tensors = {prefix.rename(name): t for path in weight_files(model_dir) for name, t in load_file(path).items()}
    model_class = getattr(transformers, config.architectures[0])
    return model_class.from_pretrained(None, config=config, state_dict=tensors, **options)
