"""Fixtures of the server room."""

import pytest


@pytest.fixture
def log(tmp_path):
    """An inspection log in a file of its own."""
    from twinspect.server.log import InspectionLog

    found = InspectionLog(str(tmp_path / "inspections.db"))
    yield found
    found.close()
