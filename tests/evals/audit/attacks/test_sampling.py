import numpy as np
import pytest
from evals.audit.planted_people import DATA, FORGET, planted, subject

from hf_transfer_ext.evals.audit.attacks.sampling import sampling


def test_the_best_of_all_samples_counts():
    shallow = subject(planted()[1])
    tries = [shallow.recall(FORGET, temperature=t, seed=seed) for t in (0.5, 2.0) for seed in range(2)]
    assert sampling(shallow, DATA, samples=2, temperatures=(0.5, 2.0)) == pytest.approx(np.max(tries, 0))


def test_the_same_seed_gives_the_same_samples_and_more_samples_find_no_less():
    shallow = subject(planted()[1])
    few, again = (sampling(shallow, DATA, samples=1, temperatures=(1.0,)) for _ in range(2))
    assert few.tolist() == again.tolist()
    assert (sampling(shallow, DATA, samples=3, temperatures=(1.0,)) >= few).all()


@pytest.mark.parametrize("options", [{"samples": 0}, {"temperatures": ()}, {"temperatures": (0.0,)}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="`samples` >= 1 and temperatures > 0"):
        sampling(subject(planted()[0]), DATA, **options)
