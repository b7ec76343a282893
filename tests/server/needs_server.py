"""Imported first by tests that need the extra ``server``: they skip, with the missing package as the reason."""

import pytest

for name in ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "sqlalchemy"):
    pytest.importorskip(name)
