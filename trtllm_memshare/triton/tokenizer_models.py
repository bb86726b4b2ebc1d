"""Triton's models `preprocessing` and `postprocessing`, for clients that call TensorRT-LLM's steps one by one.

`ensemble` does not use them. The tokenizer is loaded at the first request, so that a server whose clients never ask
pays nothing for it.
"""

from __future__ import annotations

from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

from trtllm_memshare.errors import UserError
from trtllm_memshare.serving.failures import describe
from trtllm_memshare.serving.prompts import PromptFormat, encode_prompt
from trtllm_memshare.triton.model_configs import parameters_of
from trtllm_memshare.triton.tensors import RequestTensors

_PAD_END = -1


class TokenizerModel:
    """A model that answers at once.

    Args:
      pb_utils: Triton's ``triton_python_backend_utils``.
      args: as ``initialize`` gets them.
    """

    def __init__(self, pb_utils: Any, args: dict[str, str]) -> None:
        self._pb = pb_utils
        self.parameters = parameters_of(args)

    @classmethod
    def prepare(cls, args: dict[str, str]) -> None:
        """Nothing: the tokenizer comes with the first request."""

    @cached_property
    def tokenizer(self) -> Any:
        """The model's."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.parameters["tokenizer_dir"], local_files_only=True)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request."""
        return [self._respond(RequestTensors.of(request)) for request in requests]

    def finalize(self) -> None:
        """Nothing to free."""

    def outputs(self, tensors: RequestTensors) -> dict[str, np.ndarray]:
        """Output arrays by name."""
        raise NotImplementedError

    def _respond(self, tensors: RequestTensors) -> Any:
        codes = self._pb.TritonError
        try:
            found = self.outputs(tensors)
        except UserError as error:
            return self._pb.InferenceResponse(error=codes(str(error), codes.INVALID_ARG))
        except Exception as error:  # raised further, it would end the other requests of this call too
            return self._pb.InferenceResponse(error=codes(f"the request failed: {describe(error)}", codes.INTERNAL))
        return self._pb.InferenceResponse([self._pb.Tensor(name, array) for name, array in found.items()])


class PreprocessingModel(TokenizerModel):
    """Texts to the inputs of `tensorrt_llm`, several prompts padded on the right."""

    def outputs(self, tensors: RequestTensors) -> dict[str, np.ndarray]:
        """See TensorRT-LLM's `preprocessing`; outputs for images and encoders are left out."""
        pad = self._token(tensors, "PAD_ID", "pad_token_id")
        end = self._token(tensors, "END_ID", "eos_token_id")
        limit = int(self.parameters["max_prompt_bytes"])
        queries = [row.texts("QUERY", limit) for row in tensors.rows("QUERY")]
        if any(len(texts) != 1 for texts in queries):
            raise UserError("QUERY must be one text that is not empty for each prompt")
        ids = [encode_prompt(self.tokenizer, texts[0], PromptFormat()) for texts in queries]
        longest = max(map(len, ids))
        found: dict[str, np.ndarray] = {
            "INPUT_ID": np.array([row + [pad] * (longest - len(row)) for row in ids], np.int32),
            "REQUEST_INPUT_LEN": np.array([[len(row)] for row in ids], np.int32),
            "REQUEST_OUTPUT_LEN": tensors.arrays["REQUEST_OUTPUT_LEN"].reshape(len(ids), -1).astype(np.int32),
            "DECODER_INPUT_ID": np.full((len(ids), 1), pad, np.int32),
            "REQUEST_DECODER_INPUT_LEN": np.ones((len(ids), 1), np.int32),
            "OUT_END_ID": np.full((len(ids), 1), end, np.int32),
            "OUT_PAD_ID": np.full((len(ids), 1), pad, np.int32),
            "EMBEDDING_BIAS": np.zeros((len(ids), 0), np.float32),
            "OUT_PROMPT_TABLE_EXTRA_IDS": np.zeros((len(ids), 0), np.uint64),
        }
        for words, name in (("BAD_WORDS_DICT", "BAD_WORDS_IDS"), ("STOP_WORDS_DICT", "STOP_WORDS_IDS")):
            rows = [row.texts(words) for row in tensors.rows("QUERY")]
            found[name] = _stacked([self._word_ids(texts) for texts in rows])
        return found

    def _token(self, tensors: RequestTensors, name: str, known: str) -> int:
        given = tensors.token_ids(name)
        own = getattr(self.tokenizer, known)
        if own is None:
            own = self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else 0
        return given[0] if given else int(own)

    def _word_ids(self, texts: list[str]) -> np.ndarray:
        """``[2, n]``: ids, and behind which of them a word ends."""
        words = [w for t in texts if (w := self.tokenizer(t, add_special_tokens=False)["input_ids"])]
        flat = list(chain.from_iterable(words))
        ends = np.cumsum([len(word) for word in words]).tolist()
        return np.array([flat, ends + [_PAD_END] * (len(flat) - len(ends))], np.int32).reshape(2, -1)


class PostprocessingModel(TokenizerModel):
    """Token ids to text."""

    def outputs(self, tensors: RequestTensors) -> dict[str, np.ndarray]:
        """``OUTPUT`` ``[prompts * sequences]`` from ``TOKENS_BATCH`` ``[prompts, sequences, longest]``."""
        tokens, lengths = tensors.arrays["TOKENS_BATCH"], tensors.arrays["SEQUENCE_LENGTH"]
        if tokens.ndim != 3 or lengths.shape != tokens.shape[:2]:
            raise UserError(
                f"TOKENS_BATCH must be [prompts, sequences, longest] and SEQUENCE_LENGTH [prompts, sequences], got "
                f"{list(tokens.shape)} and {list(lengths.shape)}"
            )
        sequences = [
            [int(token) for token in tokens[i, j, : max(0, lengths[i, j])] if token >= 0]
            for i in range(tokens.shape[0])
            for j in range(tokens.shape[1])
        ]
        texts = self.tokenizer.batch_decode(sequences, skip_special_tokens=True)
        return {"OUTPUT": np.array([text.encode() for text in texts], np.object_)}


def _stacked(rows: list[np.ndarray]) -> np.ndarray:
    """``[rows, 2, longest]``, shorter rows padded with 0 and -1."""
    longest = max(row.shape[1] for row in rows)
    found = np.zeros((len(rows), 2, longest), np.int32)
    found[:, 1] = _PAD_END
    for index, row in enumerate(rows):
        found[index, :, : row.shape[1]] = row
    return found
