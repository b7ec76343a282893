"""What this environment holds, followed through the requirements of its packages."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def needed(requirements: Iterable[str]) -> dict[str, metadata.Distribution]:
    """Installed distributions that requirements (PEP 508) ask for, with all that those ask for, by name.

    Raises:
        PackageNotFoundError: one is not installed.
        AssertionError: one has a version that was not asked for.
    """
    found: dict[str, metadata.Distribution] = {}
    waiting = [(Requirement(text), frozenset({""})) for text in requirements]
    done = set()
    while waiting:
        wanted, extras = waiting.pop()
        if wanted.marker is not None and not any(wanted.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        name = canonicalize_name(wanted.name)
        if (name, *sorted(wanted.extras)) in done:
            continue
        done.add((name, *sorted(wanted.extras)))
        found[name] = metadata.distribution(name)
        assert wanted.specifier.contains(found[name].version, prereleases=True), (str(wanted), found[name].version)
        waiting += [(Requirement(text), frozenset({"", *wanted.extras})) for text in found[name].requires or []]
    return found
