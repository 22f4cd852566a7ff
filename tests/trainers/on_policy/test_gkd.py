"""GKD: its batches are those of algorithm 1, and its loss is the same wherever a text comes from."""

import pytest
import torch
from trainers.test_distillation import config
from trainers.test_rollouts import WRITES

from hf_transfer_ext.trainers.on_policy import gkd
from hf_transfer_ext.trainers.rollout_method import RolloutTokens


@pytest.mark.parametrize("draw, teacher_writes, source", [
    (0.0, False, "student"), (0.29, True, "student"), (0.3, False, "data"), (0.99, True, "teacher"),
])  # fmt: skip
def test_a_batch_is_the_students_below_the_share(tmp_path, draw, teacher_writes, source):
    args = config(tmp_path, **{**WRITES, "on_policy_share": 0.3, "teacher_writes": teacher_writes})
    assert gkd().sources(draw, args, 0.0) == (source,)


def test_cross_entropy_counts_where_the_student_did_not_write(tmp_path):
    tokens = RolloutTokens(torch.tensor([True, False]), torch.tensor([0, 1]), *torch.zeros(2, 2))
    assert gkd().terms(tokens, config(tmp_path, **WRITES)) == {}
    found = gkd().terms(tokens, config(tmp_path, **{**WRITES, "on_policy_share": 0.5}, ce_weight=0.5))
    assert found["ce_factors"].tolist() == [0.0, 1.0]
    assert config(tmp_path, **{**WRITES, "on_policy_share": None}).on_policy_share == 0.5
