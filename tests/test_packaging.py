"""The installed environment itself: nothing overwrites anything."""

from __future__ import annotations

from collections import defaultdict
from importlib.metadata import distributions


def test_no_file_belongs_to_two_distributions() -> None:
    owners: dict[str, set[str]] = defaultdict(set)
    for distribution in distributions():
        for file in distribution.files or []:
            if not str(file).startswith(".."):
                owners[str(file)].add(distribution.metadata["Name"].lower())
    shared = {file: names for file, names in owners.items() if len(names) > 1 and "__pycache__" not in file}
    assert shared == {}
