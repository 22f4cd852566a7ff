import torch

from hf_transfer_ext.tensors import IGNORE_INDEX, masked_mean, masked_sum, next_token_view


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
