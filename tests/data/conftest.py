import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def said(caplog):
    """The warnings so far."""
    return lambda: [record.getMessage() for record in caplog.records if record.name == "moe_sampler.data"]
