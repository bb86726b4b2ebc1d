"""Every parser of what a user gives, as a function of bytes: it returns, or raises ``UserError``, and nothing else.

``run.py`` drives them by coverage for as long as one likes; ``test_corpus.py`` replays the committed inputs and draws
new ones in every test run.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np

from trtllm_memshare.engine import checkpoint as checkpoint_module
from trtllm_memshare.engine.build_config import parse_build_config
from trtllm_memshare.engine.checkpoint import portable_config, read_checkpoint
from trtllm_memshare.engine.engine_dir import check_keys, read_build
from trtllm_memshare.engine.gguf_header import check_gguf_header
from trtllm_memshare.engine.null_page_files import KEYS_FILE, REPORT_FILE, describe_null_pages, read_null_pages
from trtllm_memshare.engine.skeleton import Skeleton
from trtllm_memshare.engine.weights import INDEX, read_header, stored_tensors
from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.benchmark_options import parse_setting
from trtllm_memshare.evaluation.dataset import DatasetLimits, read_dataset
from trtllm_memshare.evaluation.texts import read_texts
from trtllm_memshare.json_input import parse_json
from trtllm_memshare.search.config import parse_config
from trtllm_memshare.serving.request import SamplingParams
from trtllm_memshare.serving.validation import check_group, check_params, check_prompt
from trtllm_memshare.triton.tensors import RequestTensors
from trtllm_memshare.trtllm.pytorch import settings as pytorch_settings_module
from trtllm_memshare.vllm import settings as vllm_settings_module

_MEMORY = Path("/dev/shm")  # a disk would be what the fuzzer waits for
_FOLDER = Path(tempfile.mkdtemp(prefix="memshare-fuzz-", dir=_MEMORY if _MEMORY.is_dir() else None))
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
MAX_MESSAGE = 2100  # characters of an error


class _Letters:
    """A tokenizer of the fuzzer's own: an id for each character, quick and without a vocabulary file."""

    bos_token, chat_template = "<s>", "x"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        text.encode("utf-8")  # as a real one must
        return {"input_ids": [ord(c) % 80 for c in text]}

    def __len__(self) -> int:
        return 80

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return "".join(m["role"] + m["content"] for m in messages)


def _file(name: str, data: bytes) -> Path:
    path = _FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def dataset(data: bytes) -> None:
    read_dataset(_file("d.jsonl", data), _Letters(), limits=DatasetLimits(200, 80))


def texts(data: bytes) -> None:
    read_texts(_file("t.jsonl", data))


def weights_header(data: bytes) -> None:
    """Eight bytes of length are put in front: a fuzzer hardly finds them."""
    read_header(_file("h.safetensors", len(data).to_bytes(8, "little") + data + bytes(64)))


def weights_file(data: bytes) -> None:
    read_header(_file("f.safetensors", data))


def weights_index(data: bytes) -> None:
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    _file("i/x.safetensors", len(header).to_bytes(8, "little") + header + bytes(8))
    _file(f"i/{INDEX}", data)
    stored_tensors(_FOLDER / "i")


_SKELETON = Skeleton({"model.norm.weight": (4,)}, True, 8, 2, 80)


def model_config(data: bytes) -> None:
    """config.json, with transformers' part of the work left out: it has a fuzzer of its own to fear."""
    _file("m/config.json", data)
    _file("m/tokenizer.json", b"{}")
    with mock.patch.object(checkpoint_module, "read_skeleton", return_value=_SKELETON):
        read_checkpoint(_FOLDER / "m", with_weights=False)
    portable_config(checkpoint_module.read_json(_FOLDER / "m" / "config.json", "", ""))


def engine_config(data: bytes) -> None:
    document = parse_json(data.decode("utf-8", "replace"), "config.json")
    if isinstance(document, dict):
        read_build(document, document.get("kv_cache_dtype"), Path("config.json"), "again")


def build_settings(data: bytes) -> None:
    document = parse_json(data.decode("utf-8", "replace"), "settings")
    if isinstance(document, dict):
        parse_build_config(document, "settings").check_backend("torch")


def memshare_settings(data: bytes) -> None:
    document = parse_json(data.decode("utf-8", "replace"), "memshare.json")
    check_keys(document, ("format_version", "backend", "memshare", "torch"), "memshare.json", "again")
    parse_config(document["memshare"], "memshare.json")


def setting(data: bytes) -> None:
    parse_setting(data.decode("utf-8", "surrogateescape"))


def request(data: bytes) -> None:
    """A request as a client that sends JSON would make it."""
    document = parse_json(data.decode("utf-8", "replace"), "request")
    if not isinstance(document, dict):
        return
    check_prompt(document.pop("input_ids", [1]), 80)
    check_group(document.pop("group", None))
    known = {key: value for key, value in document.items() if key in SamplingParams.__dataclass_fields__}
    check_params(SamplingParams(**known), 80)


def tensors(data: bytes) -> None:
    """Arrays as Triton hands them over: a byte says which type, the rest are its elements."""
    if not data:
        return
    kind = [np.int32, np.int64, np.float32, np.bool_, np.object_][data[0] % 5]
    body = data[1:]
    if kind is np.object_:
        array = np.array([body[:20], body[20:]], dtype=object)
    else:
        width = np.dtype(kind).itemsize
        array = np.frombuffer(body[: len(body) // width * width], kind)
    if kind is np.object_:  # Triton hands texts only to inputs that are declared as texts
        RequestTensors({"text_input": array.reshape(1, -1)}).texts("text_input")
        return
    names = ("input_ids", "temperature", "seed", "streaming", "stop_words_list")
    found = RequestTensors({name: array.reshape(shape) for name, shape in zip(names, _shapes(array), strict=True)})
    for read in (
        lambda: found.token_ids("input_ids"),
        lambda: found.number("temperature", 0.0, 0.0, 100.0),
        lambda: found.number("seed", 0, 0, 2**63 - 1),
        lambda: found.flag("streaming", False),
        lambda: found.word_lists("stop_words_list", 80),
    ):
        refused_or_done(read)


def gguf_header(data: bytes) -> None:
    """What the check lets through, the library reads or refuses within the same bounds."""
    path = _file("h.gguf", data)
    check_gguf_header(path)
    from gguf import GGUFReader

    with contextlib.suppress(Exception):  # the conversion turns whatever it raises into a sentence
        GGUFReader(path)


def null_pages(data: bytes) -> None:
    """The file of keys, and as well the report for people. The first zero byte parts the header from the tensors."""
    header, _, body = data.partition(b"\0")
    _file(f"n/{KEYS_FILE}", len(header).to_bytes(8, "little") + header + body)
    _file(f"n/{REPORT_FILE}", data)
    refused_or_done(lambda: describe_null_pages(_FOLDER / "n"))
    read_null_pages(_FOLDER / "n" / KEYS_FILE, "calibrate again")


def vllm_settings(data: bytes) -> None:
    variable = {vllm_settings_module.CONFIG_VARIABLE: str(_file("vllm.json", data))}
    vllm_settings_module.load_settings({}, variable)


def pytorch_settings(data: bytes) -> None:
    variable = {f"{pytorch_settings_module.PREFIX}CONFIG": str(_file("pytorch.json", data))}
    pytorch_settings_module.load_settings(variable)


def _shapes(array: np.ndarray) -> list[tuple[int, ...]]:
    n = array.size
    return [(1, n), (n,), (1, n), (n, 1), (1, 2, n // 2) if n % 2 == 0 else (n,)]


TARGETS: dict[str, Callable[[bytes], None]] = {
    f.__name__: f
    for f in (
        dataset,
        texts,
        weights_header,
        weights_file,
        weights_index,
        model_config,
        engine_config,
        build_settings,
        memshare_settings,
        setting,
        request,
        tensors,
        gguf_header,
        null_pages,
        vllm_settings,
        pytorch_settings,
    )
}
SERVICE_TARGETS = ("openai_body", "token_socket")
"""In ``service_targets``."""
NAMES = (*TARGETS, *SERVICE_TARGETS)


def find_target(name: str) -> Callable[[bytes], None]:
    """The parser of a name; imports what it needs."""
    if name in TARGETS:
        return TARGETS[name]
    target: Callable[[bytes], None] = getattr(importlib.import_module("fuzz.service_targets"), name)
    return target


def refused_or_done(parse: Callable[[], object]) -> bool:
    """Whether the parser took the input; checks that it was refused with a sentence otherwise."""
    try:
        parse()
    except UserError as error:
        message = str(error)
        assert 0 < len(message) <= MAX_MESSAGE
        message.encode("utf-8")  # can be printed
        return False
    return True


def run_target(name: str, data: bytes) -> bool:
    """One input through one parser."""
    return refused_or_done(lambda: find_target(name)(data))
