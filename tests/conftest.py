"""Settings for every test: no network, few threads, and properties that are the same each run."""

import atexit
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would download fails instead
os.environ["OMP_WAIT_POLICY"] = "passive"  # before torch is imported: spinning threads are slow on a busy machine
os.environ["TOKENIZERS_PARALLELISM"] = "false"

if "GEMKIT_CACHE" not in os.environ:  # packed models of tests are nobody's
    os.environ["GEMKIT_CACHE"] = tempfile.mkdtemp(prefix="gemkit-tests-")
    atexit.register(shutil.rmtree, os.environ["GEMKIT_CACHE"], ignore_errors=True)

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "gemkit",
    deadline=None,  # a shared machine pauses; a hang is caught by pytest-timeout
    derandomize=True,  # CI must not fail by chance; fuzz further with --hypothesis-seed and HYPOTHESIS_PROFILE=search
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("search", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gemkit"))


@pytest.fixture(params=["definition", "library"])
def made_dense(request):
    """Both ways in which quantized weights are made dense: by the definition in torch, and by the native library."""
    from gemkit.executors.native import dequantize

    with dequantize.enabled(request.param == "library"):
        yield
