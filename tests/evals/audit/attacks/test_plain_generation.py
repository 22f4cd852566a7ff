from evals.audit.planted_people import DATA, planted, subject

from hf_transfer_ext.evals.audit.attacks.plain_generation import plain_generation


def test_what_is_written_is_held_against_the_answer():
    original, shallow, _ = map(subject, planted())
    assert plain_generation(original, DATA).tolist() == [1.0] * len(DATA.forget)
    assert plain_generation(shallow, DATA).tolist() == [0.0] * len(DATA.forget)  # it writes its refusal
