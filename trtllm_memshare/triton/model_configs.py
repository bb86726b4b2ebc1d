"""The files of each model of a repository: ``config.pbtxt``, and ``model.py`` where it is a python model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

from trtllm_memshare.triton.inputs import TEXT_OUTPUTS, TOKEN_OUTPUTS, input_lines, output_lines

PREPROCESSING_INPUTS = """\
  { name: "QUERY" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "REQUEST_OUTPUT_LEN" data_type: TYPE_INT32 dims: [ 1 ] },
  { name: "BAD_WORDS_DICT" data_type: TYPE_STRING dims: [ -1 ] optional: true },
  { name: "STOP_WORDS_DICT" data_type: TYPE_STRING dims: [ -1 ] optional: true },
  { name: "END_ID" data_type: TYPE_INT32 dims: [ 1 ] optional: true },
  { name: "PAD_ID" data_type: TYPE_INT32 dims: [ 1 ] optional: true }"""
_PREPROCESSING_OUTPUTS: dict[str, tuple[str, tuple[int, ...]]] = {
    "INPUT_ID": ("INT32", (-1,)),
    "REQUEST_INPUT_LEN": ("INT32", (1,)),
    "DECODER_INPUT_ID": ("INT32", (-1,)),
    "REQUEST_DECODER_INPUT_LEN": ("INT32", (1,)),
    "BAD_WORDS_IDS": ("INT32", (2, -1)),
    "STOP_WORDS_IDS": ("INT32", (2, -1)),
    "EMBEDDING_BIAS": ("FP32", (-1,)),
    "REQUEST_OUTPUT_LEN": ("INT32", (-1,)),
    "OUT_END_ID": ("INT32", (1,)),
    "OUT_PAD_ID": ("INT32", (1,)),
    "OUT_PROMPT_TABLE_EXTRA_IDS": ("UINT64", (-1,)),
}
_POSTPROCESSING_INPUTS = """\
  { name: "TOKENS_BATCH" data_type: TYPE_INT32 dims: [ -1, -1 ] },
  { name: "SEQUENCE_LENGTH" data_type: TYPE_INT32 dims: [ -1 ] }"""

_WITHOUT_TORCH = """\
sys.modules["torch"] = None  # transformers would import it, which takes longer than all else, and tokenizers need none
"""


@dataclass(frozen=True)
class ModelFiles:
    """One model.

    Attributes:
      inputs, outputs: lines of its configuration.
      decoupled: whether it follows the deployment's setting; False = it always answers once.
      code: module and class behind it; empty = Triton hands its requests on to `ensemble`.
    """

    inputs: str
    outputs: dict[str, tuple[str, tuple[int, ...]]]
    decoupled: bool
    code: tuple[str, str] | None


MODELS = {
    "tensorrt_llm": ModelFiles(input_lines("token"), TOKEN_OUTPUTS, True, ("token_model", "TokenModel")),
    "ensemble": ModelFiles(input_lines("text"), TEXT_OUTPUTS, True, ("ensemble_model", "EnsembleModel")),
    "tensorrt_llm_bls": ModelFiles(input_lines("text"), TEXT_OUTPUTS, True, None),
    "preprocessing": ModelFiles(
        PREPROCESSING_INPUTS, _PREPROCESSING_OUTPUTS, False, ("tokenizer_models", "PreprocessingModel")
    ),
    "postprocessing": ModelFiles(
        _POSTPROCESSING_INPUTS, {"OUTPUT": ("STRING", (-1,))}, False, ("tokenizer_models", "PostprocessingModel")
    ),
}
"""By name, as TensorRT-LLM's repository has them."""


def parameters_of(args: dict[str, str]) -> dict[str, str]:
    """What ``write_model`` was given as ``parameters``; ``args``: as a model's ``initialize`` gets them."""
    return {k: v["string_value"] for k, v in json.loads(args["model_config"])["parameters"].items()}


def write_model(repository: Path, name: str, parameters: dict[str, str], max_batch_size: int, decoupled: bool) -> None:
    """Writes one of ``MODELS``.

    Args:
      repository: folder of all models.
      parameters: of the deployment; every model gets all of them.
      max_batch_size: most prompts of one request.
      decoupled: the deployment's setting.
    """
    templates = resources.files("trtllm_memshare") / "triton" / "templates"
    model = MODELS[name]
    version = repository / name / "1"
    version.mkdir(parents=True)
    inputs = model.inputs
    fields = {
        "name": name,
        "max_batch_size": str(max_batch_size),
        "decoupled": str(model.decoupled and decoupled).lower(),
        "inputs": inputs,
        "outputs": output_lines(model.outputs),
        "parameters": "\n".join(
            f"parameters: {{ key: {_quoted(key)} value: {{ string_value: {_quoted(value)} }} }}"
            for key, value in parameters.items()
        ),
    }
    if model.code is None:
        names = [line.partition('"')[2].partition('"')[0] for line in inputs.splitlines()]
        maps = [f'      input_map {{ key: "{n}" value: "{n}" }}' for n in names]
        maps += [f'      output_map {{ key: "{n}" value: "{n}" }}' for n in model.outputs]
        fields["maps"] = "\n".join(maps)
        config = Template((templates / "forwarding.pbtxt").read_text())
        (version / ".keep").touch()  # Triton wants the folder of the version
    else:
        config = Template((templates / "python.pbtxt").read_text())
        code = Template((templates / "model.py.template").read_text())
        module, model_class = model.code
        preamble = "" if module == "token_model" else _WITHOUT_TORCH
        (version / "model.py").write_text(code.substitute(module=module, model_class=model_class, preamble=preamble))
    (repository / name / "config.pbtxt").write_text(config.substitute(fields))


def _quoted(text: str) -> str:
    """A string of protobuf's text format, whose escapes are JSON's."""
    return json.dumps(text, ensure_ascii=False)
