"""Loads the model of a checkpoint, under either transformers, whatever prefix its stored names carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtllm_memshare.engine.tensors import find_prefix
from trtllm_memshare.engine.weights import stored_tensors, weight_files


def load_decoder(model_dir: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model in its own dtype, and what transformers reports of the loading.

    Args:
      model_dir: a checkpoint that ``read_checkpoint`` accepts.
      options: for ``from_pretrained``, such as ``attn_implementation``.
    """
    import transformers
    from safetensors.torch import load_file

    options = {**options, "dtype": "auto", "trust_remote_code": False, "output_loading_info": True}
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
