"""F1 by label and by entity, and rank correlation, on examples worked by hand."""

import pytest
import torch
from scipy.stats import spearmanr

from hf_transfer_ext.trainers.task_metrics import entities, entity_f1, f1_by_label, f1_of_yes, macro_f1, spearman


def test_f1_by_label_and_its_mean():
    scores = f1_by_label(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]), 3)
    assert scores[:2].tolist() == pytest.approx([2 / 3, 0.8]) and scores[2].isnan()
    assert macro_f1(scores) == pytest.approx((2 / 3 + 0.8) / 2)
    yes = f1_of_yes(torch.tensor([[1, 0], [1, 1]]), torch.tensor([[1, 1], [0, 1]]))
    assert yes.tolist() == pytest.approx([2 / 3, 2 / 3])


def test_entities_are_whole_spans_of_one_type():
    assert entities(["B-A", "I-A", "O", "I-B", "B-B"]) == {(0, 2, "A"), (3, 4, "B"), (4, 5, "B")}
    assert entities(["B-A", "I-B"]) == {(0, 1, "A"), (1, 2, "B")}
    assert entity_f1([["B-A", "O", "B-B"]], [["B-A", "I-A", "B-B"]]) == pytest.approx(0.5)
    assert entity_f1([["O"]], [["O"]]) == 0.0


def test_rank_correlation_shares_the_ranks_of_equal_values():
    x, y = torch.tensor([1.0, 2.0, 2.0, 5.0, 3.0]), torch.tensor([2.0, 1.0, 4.0, 4.0, 3.0])
    assert spearman(x, y) == pytest.approx(spearmanr(x.numpy(), y.numpy()).statistic)
