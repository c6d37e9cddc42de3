"""The kernels, compiled for each instruction set that runs here."""

import pytest

from support import kernels as built


@pytest.fixture(scope="session")
def kernels(tmp_path_factory) -> dict[str, built.Kernels]:
    """By name of the instruction set; the portable ones are always there."""
    folder = tmp_path_factory.mktemp("kernels")
    return {isa: built.Kernels(isa, folder) for isa in built.ISAS}


@pytest.fixture(params=built.ISAS)
def kernel(request, kernels) -> built.Kernels:
    return kernels[request.param]
