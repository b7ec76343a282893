"""The tests on development images are collected where those images are; a clone has none."""

from tiny import SHARED

collect_ignore = [] if (SHARED / "parts").is_dir() else ["test_real_data.py"]
