"""Ordinary checkpoints out of GGUF files: transformers dequantizes, and a folder in Hugging Face layout comes out."""

from __future__ import annotations

import importlib.util
import json
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

from trtllm_memshare.engine.checkpoint import SUPPORTED, portable_config, read_checkpoint
from trtllm_memshare.engine.gguf_header import check_gguf_header
from trtllm_memshare.errors import UserError, shorten
from trtllm_memshare.json_input import read_json

_NEEDS = ("gguf", "accelerate")
_SOURCE_FILE = "gguf.source"  # by its ending nothing that engines copy
_PLACES = {
    "token_embd": ("model.embed_tokens",),
    "output": ("lm_head",),
    "output_norm": ("model.norm",),
    "attn_norm": ("input_layernorm",),
    "attn_q": ("self_attn.q_proj",),
    "attn_k": ("self_attn.k_proj",),
    "attn_v": ("self_attn.v_proj",),
    "attn_qkv": ("self_attn.qkv_proj",),
    "attn_q_norm": ("self_attn.q_norm",),
    "attn_k_norm": ("self_attn.k_norm",),
    "attn_output": ("self_attn.o_proj",),
    "ffn_norm": ("post_attention_layernorm",),
    "ffn_gate": ("mlp.gate_proj",),
    "ffn_up": ("mlp.up_proj", "mlp.gate_up_proj"),
    "ffn_down": ("mlp.down_proj",),
}
"""llama.cpp's names of tensors, and those that transformers has in the architectures of ``SUPPORTED``."""
_TENSOR = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")


def is_gguf(path: Path) -> bool:
    """Whether a path that a user named as a model is a GGUF file and not a folder."""
    return path.suffix == ".gguf" and not path.is_dir()


def checkpoint_of_gguf(gguf_file: Path) -> Path:
    """The checkpoint folder beside a GGUF file, ``x.gguf`` -> ``x/``; dequantizes the file where there is none yet.

    Raises:
      UserError: see ``convert_gguf``; or a folder there that is no checkpoint, or was made from another file.
    """
    folder = gguf_file.with_suffix("")
    if not folder.exists():
        return convert_gguf(gguf_file, folder)
    read_checkpoint(folder)
    if gguf_file.is_file() and not _is_made_from(folder, gguf_file):
        raise UserError(f"{folder} was made from another file than {gguf_file} (remove the folder, build again)")
    return folder


def convert_gguf(gguf_file: Path, output_dir: Path, force: bool = False) -> Path:
    """Dequantizes a GGUF file to float32 and writes it as an ordinary checkpoint, tokenizer included.

    The folder appears whole or not at all: it is written under another name and renamed.

    Args:
      gguf_file: of an architecture in ``SUPPORTED``.
      output_dir: must not exist, unless ``force``: then it may be a model's folder, or empty.

    Returns:
      ``output_dir``.

    Raises:
      UserError: no GGUF file, another architecture, packages that are missing, a folder that is there already or is no
        model's, or a model that ``read_checkpoint`` refuses.
    """
    tensors = check_gguf_header(gguf_file)
    source = _source(gguf_file)  # before it is read: a file that changes meanwhile is another one
    if output_dir.exists():
        _check_replaceable(output_dir, force)
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"reading {gguf_file} needs the package{'s' * (len(missing) > 1)} {' and '.join(missing)} "
            f"(pip install '.[real]')"
        )
    part = output_dir.with_name(f".{output_dir.name}.{secrets.token_hex(4)}")  # nobody else's, whoever converts beside
    old = part.with_name(f"{part.name}.old")
    try:
        _save_plain(gguf_file, tensors, part)
        try:
            read_checkpoint(part)
        except UserError as error:
            raise UserError(
                f"{gguf_file} is not served: {str(error).replace(str(part), str(output_dir))} (nothing was written)"
            ) from error
        (part / _SOURCE_FILE).write_text(json.dumps(source) + "\n")
        if output_dir.exists():
            output_dir.rename(old)
        try:
            part.rename(output_dir)
        except OSError as error:
            if old.exists() and not output_dir.exists():
                old.rename(output_dir)
            raise UserError(f"cannot write {output_dir}: {error.strerror} (does another command write it?)") from error
    finally:
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)
    return output_dir


def _source(gguf_file: Path) -> dict[str, int]:
    """What tells a file from another one under its name: an older one may come, with the date of its own day."""
    stat = gguf_file.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _is_made_from(folder: Path, gguf_file: Path) -> bool:
    note = folder / _SOURCE_FILE
    if note.is_file():
        return bool(read_json(note, "the checkpoint", "remove the folder, build again") == _source(gguf_file))
    # A folder of before, without the note.
    return (folder / "config.json").stat().st_mtime >= gguf_file.stat().st_mtime


def _check_replaceable(output_dir: Path, force: bool) -> None:
    """Raises UserError unless what is there may go: by ``force``, and only what a model's folder is."""
    if not force:
        raise UserError(f"{output_dir} exists already (add --force to replace it, or name another --output-dir)")
    config = output_dir / "config.json"
    if config.is_file() and read_json(config, "the folder to replace", "name another --output-dir").get(
        "architectures"
    ):
        return
    if not output_dir.is_dir() or any(output_dir.iterdir()):
        raise UserError(
            f"{output_dir} must be a model's folder or empty to be replaced, got no config.json with architectures "
            f"(move it away, or name another --output-dir)"
        )


def _save_plain(gguf_file: Path, tensors: list[str], folder: Path) -> None:
    """transformers refuses to save what it read from a GGUF file as quantized, so a plain model takes the weights.

    Args:
      tensors: names of all that the file holds: transformers passes over those that it has no place for.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    where: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf_file.parent),
        "gguf_file": gguf_file.name,
        "local_files_only": True,
    }
    try:
        config = AutoConfig.from_pretrained(**where)
        name = NAMES.get(config.model_type, config.model_type)
        if name not in SUPPORTED:
            raise UserError(f"{gguf_file} has architecture {name}, expected one of {', '.join(SUPPORTED)}")
        read, report = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, output_loading_info=True)
        if report["missing_keys"]:  # transformers has put random numbers there
            raise UserError(f"{gguf_file} lacks the tensor of {min(report['missing_keys'])} (download it again)")
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except UserError:
        raise
    except Exception as error:  # transformers and gguf raise anything over metadata that no model has
        reason = shorten(str(error).splitlines()[0]) if str(error) else type(error).__name__
        raise UserError(f"cannot read {gguf_file}: {reason} (take a GGUF file of {', '.join(SUPPORTED)})") from error
    plain = type(read.config).from_dict(
        {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    )
    plain.architectures = [name]
    model = type(read)(plain)
    missing, unknown = model.load_state_dict(read.state_dict(), strict=False)
    model.tie_weights()
    lost = [key for key in missing if not (plain.tie_word_embeddings and key == "lm_head.weight")]
    if lost or unknown:
        raise UserError(f"{gguf_file} does not hold the weights of a {name}: {(lost + list(unknown))[0]} does not fit")
    if left := [tensor for tensor in tensors if not _has_place(tensor, model.state_dict())]:
        raise UserError(
            f"{gguf_file} has the tensor {shorten(left[0])}, for which transformers' {name} has no place: the model "
            f"would compute something else (take its Hugging Face checkpoint)"
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _make_portable(folder)


def _has_place(tensor: str, model: dict[str, Any]) -> bool:
    """Whether a tensor of a GGUF file is one of a model's ``state_dict``: blk.0.attn_q.bias, if its q_proj has one."""
    found = _TENSOR.fullmatch(tensor)
    if found is None:
        return False
    layer, stem, kind = found.groups()
    before = "" if layer is None else f"model.layers.{layer}."
    return any(f"{before}{place}.{kind}" in model for place in _PLACES.get(stem, ()))


def _make_portable(folder: Path) -> None:
    """What 5.x saves, 4.57 reads otherwise (the rotation) or not at all (its new name for a tokenizer's class)."""
    config, tokenizer = folder / "config.json", folder / "tokenizer_config.json"
    config.write_text(json.dumps(portable_config(json.loads(config.read_text())), indent=2) + "\n")
    settings = json.loads(tokenizer.read_text())
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        tokenizer.write_text(json.dumps(settings, indent=2) + "\n")
