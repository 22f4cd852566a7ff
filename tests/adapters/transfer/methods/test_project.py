import dataclasses

import pytest
import torch
from adapters.transfer.pairs import dense, rotation, twin, with_target

from hf_transfer_ext.adapters.transfer.methods.project import project


def directions(weight, count):
    left, _, right = torch.linalg.svd(weight.double())
    return left[:, :count], right[:count].T


@pytest.mark.parametrize("kind", ["q_proj", "up_proj", "down_proj"])
def test_it_is_its_definition(kind):
    pair, _ = twin(kind)
    pair = dataclasses.replace(pair, target=pair.target @ rotation(pair.target.shape[1], 2))
    (us, vs), (ut, vt) = directions(pair.source, 5), directions(pair.target, 5)
    change, eye_u, eye_v = dense(pair.change).double(), torch.eye(len(us)), torch.eye(len(vs))
    pu, pv, qu, qv = us @ us.T, vs @ vs.T, ut @ ut.T, vt @ vt.T
    inside, outside = pu @ change @ pv, (eye_u - pu) @ change @ (eye_v - pv)
    expected = qu @ inside @ qv + (eye_u - qu) @ outside @ (eye_v - qv)
    torch.testing.assert_close(dense(project(pair, subspace=5)).double(), expected, rtol=1e-4, atol=1e-4)
    plain = project(pair, subspace=5, null_space=False)
    torch.testing.assert_close(dense(plain).double(), qu @ change @ qv, rtol=1e-4, atol=1e-4)


def test_a_layer_of_another_subspace_is_left_out():
    pair, _ = twin("up_proj")
    assert project(pair, subspace=4, threshold=0.99) is not None  # a subspace overlaps itself fully
    other = dataclasses.replace(pair, target=rotation(20, 3) @ pair.target)
    assert project(other, subspace=4, threshold=0.9) is None


@pytest.mark.parametrize("options", [{"subspace": 0}, {"threshold": 1.5}, {"threshold": -0.1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="`subspace` must be at least 1 and `threshold` between 0 and 1"):
        project(twin("q_proj")[0], **options)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="`project` needs equal shapes"):
        project(with_target(twin("q_proj")[0], torch.zeros(3, 3)))
