import torch

from hf_transfer_ext.losses.unlearning import retain_nll


def test_it_is_the_cross_entropy():
    logits, targets = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 5, 2, 2])
    log_probs = torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(retain_nll(log_probs), expected)
