"""Every merge method is tested with the compiled kernels, and with torch alone."""

from __future__ import annotations

import pytest

from hf_transfer_ext.merging.arithmetic import kernels


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def arithmetic(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(kernels, "LIBRARY", None)
    elif kernels.LIBRARY is None:
        pytest.skip("the kernels are not built: there was no C compiler at installation")
    return request.param
