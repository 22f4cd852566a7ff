import pytest
import torch

from hf_transfer_ext.tensors import (
    IGNORE_INDEX,
    dtype_by_name,
    masked_mean,
    masked_sum,
    next_token_view,
    predicting_rows,
)


def test_the_view_pairs_each_position_with_the_token_it_predicts():
    logits = torch.arange(2 * 4 * 3, dtype=torch.float32).view(2, 4, 3)
    labels = torch.tensor([[IGNORE_INDEX, 1, 2, 0], [2, IGNORE_INDEX, 1, IGNORE_INDEX]])
    view, targets, mask = next_token_view(logits, labels)
    assert torch.equal(view, logits[:, :3])
    assert targets.tolist() == [[1, 2, 0], [IGNORE_INDEX, 1, IGNORE_INDEX]]
    assert mask.tolist() == [[True, True, True], [False, True, False]]


def test_masked_sums_ignore_what_is_masked_and_keep_a_gradient():
    values = torch.tensor([[1.0, float("nan"), 3.0]], requires_grad=True)
    mask = torch.tensor([[True, False, True]])
    assert masked_sum(values, mask).item() == 4.0
    assert masked_mean(values, mask).item() == 2.0
    empty = masked_mean(values, torch.zeros_like(mask))
    empty.backward()
    assert empty.item() == 0.0 and values.grad.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_dtype_by_its_name(name):
    assert dtype_by_name(name) is torch.bfloat16


@pytest.mark.parametrize("name", ["float33", "nn", "", None, 16, "torch.Tensor"])
def test_what_names_no_dtype(name):
    assert dtype_by_name(name) is None


def test_virtual_tokens_in_front_are_passed_over():
    states = torch.arange(2 * 5.0).view(2, 5, 1)  # two virtual tokens, and three of the batch
    mask = torch.tensor([[True, False], [True, True]])
    assert predicting_rows(states, mask).flatten().tolist() == [2.0, 7.0, 8.0]
    assert predicting_rows(states[:, 2:], mask).flatten().tolist() == [2.0, 7.0, 8.0]
