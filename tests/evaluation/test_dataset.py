"""Reading data sets, good and bad."""

from __future__ import annotations

import json

import pytest

from build_scripts.tiny_reasoner.tokenizer import build_tokenizer
from trtllm_memshare import json_input
from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.dataset import DatasetItem, DatasetLimits, draw_samples, read_dataset
from trtllm_memshare.serving.prompts import PromptFormat, encode_messages

TOKENIZER = build_tokenizer(512)
GOOD = {"task_id": 3, "prompt": "Q: 1 + 2 = ?\n", "output_tokens": 9, "answer": 3}


def test_prompts_and_ids_are_read(tmp_path):
    path = tmp_path / "d.jsonl"
    ids = {"task_id": 4, "input_ids": [5, 6], "output_tokens": 2, "output": "12 34"}
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(ids) + "\n" + json.dumps(GOOD))
    first, second = read_dataset(path, TOKENIZER, limit=2)
    assert (first.task_id, first.output_tokens, first.answer) == (3, 9, "3")
    assert TOKENIZER.decode(first.input_ids) == GOOD["prompt"]
    assert (second.input_ids, second.answer) == ([5, 6], None)
    assert TOKENIZER.decode(second.output_ids) == "12"  # cut to output_tokens
    assert first.output_ids is None


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    (tmp_path / "d.jsonl").write_text(f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}\n", encoding="utf-8-sig")
    assert [item.task_id for item in read_dataset(tmp_path / "d.jsonl", TOKENIZER)] == [3, 3]


@pytest.mark.parametrize(
    ("written", "expected"),
    [("193", "193"), ("193.0", "193"), ("-2e1", "-20"), ("0.5", "0.5"), ('"193.0"', "193.0"), ("null", None)],
)
def test_a_whole_number_is_the_same_answer_however_json_writes_it(tmp_path, written, expected):
    path = tmp_path / "d.jsonl"
    path.write_text(f'{{"task_id": 0, "prompt": "Q: 1", "output_tokens": 9, "answer": {written}}}')
    assert read_dataset(path, TOKENIZER)[0].answer == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", r"d.jsonl line 2 is not JSON: .* \(one object per line\)"),
        ("[1]", "line 2 must be a JSON object, got list"),
        (json.dumps({**GOOD, "output_tokens": 0}), "line 2: output_tokens must be a positive integer, got 0"),
        (json.dumps({**GOOD, "task_id": "x"}), "line 2: task_id must be an integer, got 'x'"),
        (json.dumps({**GOOD, "output": ""}), "line 2: output must be text that continues the prompt, got ''"),
        (json.dumps({"task_id": 1, "output_tokens": 1}), "line 2: needs a prompt: one of .*got none"),
        (json.dumps({**GOOD, "input_ids": [5]}), "line 2: needs a prompt: one of .*got prompt and input_ids"),
        (
            json.dumps({"task_id": 1, "output_tokens": 1, "input_ids": [99]}),
            r"line 2: input_ids\[0\] must be between 0",
        ),
        (json.dumps({**GOOD, "anwser": 3}), r"line 2 has an unknown key anwser \(did you mean answer\?\)"),
        (
            json.dumps({**GOOD, "output_tokens": 10**30}),
            r"line 2: output_tokens must be at most 100, got 10{30} .lower it",
        ),
        (json.dumps({**GOOD, "output_tokens": True}), "output_tokens must be a positive integer, got True"),
        (json.dumps({**GOOD, "answer": True}), "answer must be a text or a number, got True"),
        (json.dumps({**GOOD, "answer": ["3"]}), "answer must be a text or a number"),
        (json.dumps({**GOOD, "prompt": "\ud800"}), "line 2 is not usable: a text has half of a surrogate pair"),
        (json.dumps({**GOOD, "prompt": 5}), "line 2: a prompt must be a text"),
        (
            json.dumps({**GOOD, "prompt": "1" * 200}),
            r"line 2: prompt and output must fit max_seq_len 100, got 200 \+ 9",
        ),
        (json.dumps({**GOOD, "prompt": "1" * 26_000}), "line 2: a prompt of 26,000 characters cannot fit 100 tokens"),
        (json.dumps({**GOOD, "add_special_tokens": 1}), "add_special_tokens must be true or false, got 1"),
        ('{"task_id": ' + "1" * 5000 + "}", "line 2 is not usable: Exceeds the limit"),
        ("[" * 100_000, "line 2 is not usable: its JSON is nested too deeply"),
        ('{"task_id": NaN}', "NaN is no JSON number"),
        (
            json.dumps({"task_id": 1, "output_tokens": 9, "messages": [{"role": "user", "content": "x"}]}),
            "line 2: the model's tokenizer has no chat template",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        read_dataset(path, TOKENIZER, limits=DatasetLimits(100, 80))
    assert len(str(caught.value)) < 500


def test_a_text_whose_tokens_the_model_does_not_know(tmp_path):
    """An added token of the tokenizer, beyond the model's vocabulary."""
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"task_id": 1, "output_tokens": 1, "prompt": "Q: 1"}))
    last = max(TOKENIZER("Q: 1")["input_ids"])
    with pytest.raises(UserError, match=rf"line 1: input_ids\[\d\] must be between 0 and {last - 1}, got {last}"):
        read_dataset(path, TOKENIZER, limits=DatasetLimits(100, last))


def test_texts_that_are_not_utf_8_and_lines_without_end(tmp_path, monkeypatch):
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + b'{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"line 2 is not UTF-8 text: invalid start byte at byte 12 \(convert"):
        read_dataset(path, TOKENIZER)
    monkeypatch.setattr(json_input, "MAX_LINE_BYTES", 1000)
    path.write_text(json.dumps(GOOD) + "\n" + "x" * 1001)
    with pytest.raises(UserError, match=r"line 2 is longer than 1,000 bytes"):
        read_dataset(path, TOKENIZER)


def test_ids_under_the_name_that_trtllm_bench_gives_them(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"task_id": 0, "logits": [5, 6, 7], "output_tokens": 2}))
    assert read_dataset(path, TOKENIZER)[0].input_ids == [5, 6, 7]


class WithBos:
    """The tokenizer with a BOS and a template, as Llama's: ids of its own for both."""

    bos_token = "<eos>"
    chat_template = "x"

    def __call__(self, text, add_special_tokens=True):
        ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}

    def __len__(self):
        return len(TOKENIZER)

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert add_generation_prompt
        assert not tokenize
        if messages[0]["content"] == "refused":
            raise ValueError("Conversation roles must alternate")
        return "<eos>" + "".join(m["content"] for m in messages) + "<think>"


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"prompt": "12"}, {}, "<eos>12"),
        ({"prompt": "<eos>12"}, {}, "<eos>12"),  # one BOS, not two
        ({"prompt": "<eos>12"}, {"add_special_tokens": True}, "<eos><eos>12"),
        ({"prompt": "12"}, {"add_special_tokens": False}, "12"),
        ({"prompt": "12", "add_special_tokens": False}, {}, "12"),
        ({"prompt": "12"}, {"chat_template": True}, "<eos>12<think>"),
        ({"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}, {}, "<eos>12<think>"),
    ],
)
def test_special_tokens_stand_once(tmp_path, row, options, expected):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"task_id": 0, "output_tokens": 2, **row}))
    item = read_dataset(path, WithBos(), prompt_format=PromptFormat(**options))[0]
    assert TOKENIZER.decode(item.input_ids) == expected


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a list of at least one message"),
        ("hello", "messages must be a list"),
        ([5], r"messages\[0\] must be an object with role and content"),
        ([{"role": "user"}], r"messages\[0\] must be an object with role and content"),
        ([{"role": "root", "content": "x"}], r"messages\[0\].role must be one of system, .*got 'root'"),
        ([{"role": "user", "content": "refused"}], "the chat template refuses the messages: Conversation roles must"),
        ([{"role": "user", "content": "\ud800"}], "half of a surrogate pair"),
    ],
)
def test_messages_that_no_template_takes(messages, message):
    with pytest.raises(UserError, match=message):
        encode_messages(WithBos(), messages)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match="no data set at"):
        read_dataset(tmp_path / "none.jsonl", TOKENIZER)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no requests"):
        read_dataset(tmp_path / "empty.jsonl", TOKENIZER)


@pytest.mark.parametrize("count", [1, 2])
def test_every_sample_draws_from_a_seed_of_its_own(count):
    """Problems that drew from one stream would not be independent, as standard errors take them to be."""
    samples = draw_samples([DatasetItem(i, [5], 1, None) for i in range(3)], count)
    assert [sample.seed for sample in samples] == list(range(3 * count))
