import pytest

from hf_transfer_ext.registry import Registry, unknown_name


def alpha():
    return 1


def beta():
    return 2


def test_a_function_is_found_by_its_own_name():
    registry = Registry("letter", [alpha, beta])
    assert registry["alpha"] is alpha
    assert list(registry) == ["alpha", "beta"]
    assert "beta" in registry and "gamma" not in registry and len(registry) == 2


def test_a_typo_is_answered_with_the_nearest_name_and_all_names():
    with pytest.raises(ValueError, match=r"Unknown letter 'alhpa'\. Did you mean 'alpha'\? Available: alpha, beta\."):
        Registry("letter", [alpha, beta])["alhpa"]


def test_a_far_name_gets_no_suggestion():
    assert "Did you mean" not in unknown_name("letter", "zzzzzz", ["alpha"])


def test_outside_code_registers_and_cannot_shadow():
    registry = Registry("letter", [alpha])

    @registry.register
    def gamma():
        return 3

    assert registry["gamma"] is gamma

    def alpha_again():
        return 4

    alpha_again.__name__ = "alpha"
    with pytest.raises(ValueError, match="already registered"):
        registry.register(alpha_again)
