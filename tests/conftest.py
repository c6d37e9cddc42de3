"""Settings for every test: no network, few threads, and properties that are the same each run."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would download fails instead
os.environ["OMP_WAIT_POLICY"] = "passive"  # before torch is imported: spinning threads are slow on a busy machine
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis

hypothesis.settings.register_profile(
    "gemkit",
    deadline=None,  # a shared machine pauses; a hang is caught by pytest-timeout
    derandomize=True,  # CI must not fail by chance; fuzz further with --hypothesis-seed and HYPOTHESIS_PROFILE=search
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("search", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gemkit"))
