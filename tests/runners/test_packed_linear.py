"""Linear layers whose weights are laid out once, beside torch's own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.torch.packed_linear import PackedLinear, pack_linears


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 512), (7, 512), (1, 33, 512)])
def test_a_packed_layer_gives_the_products_of_its_linear_layer(shape, bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(512, 768, bias=bias)
    rows = torch.randn(shape)
    with torch.inference_mode():
        packed = PackedLinear(linear)(rows)
        torch.testing.assert_close(packed.double(), linear.double()(rows.double()), rtol=0, atol=1e-5)


def test_only_large_float32_layers_are_packed_and_their_plain_weights_go():
    model = torch.nn.Sequential(
        torch.nn.Linear(512, 768), torch.nn.Linear(32, 64), torch.nn.Linear(512, 768, dtype=torch.bfloat16)
    )
    pack_linears(model)
    assert [type(layer) for layer in model] == [PackedLinear, torch.nn.Linear, torch.nn.Linear]
    assert "weight" not in dict(model[0].named_parameters())
    assert model[0].bias is not None


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda model: model.to(torch.bfloat16), r"a move to torch.bfloat16 on cpu"),
        (lambda model: model.double(), r"a move to torch.float64 on cpu"),
        (lambda model: model.to("meta"), r"a move to torch.float32 on meta"),
        (copy.deepcopy, "a copy"),
        (pickle.dumps, "a copy"),
        (lambda model: model.state_dict(), "state_dict"),
    ],
)
def test_what_packed_weights_cannot_follow_is_refused_at_once(change, got):
    model = torch.nn.Sequential(PackedLinear(torch.nn.Linear(16, 32)))
    with pytest.raises(UserError, match=rf"neither moved, .* got {got} \(give load_model the dtype or device"):
        change(model)
    rows = torch.randn(2, 16)
    expected = model(rows)
    assert torch.equal(model.to("cpu").float()(rows), expected)  # nothing to move


def test_a_tied_output_layer_is_packed_and_the_embedding_stays():
    embedding, head = torch.nn.Embedding(1024, 512), torch.nn.Linear(512, 1024, bias=False)
    head.weight = embedding.weight
    model = torch.nn.ModuleDict({"embedding": embedding, "head": head})
    pack_linears(model)
    torch.testing.assert_close(
        model["head"](embedding(torch.tensor([3]))), embedding.weight[3:4] @ embedding.weight.T, rtol=1e-5, atol=1e-4
    )
