"""Makes the modules of tests/ importable here, and skips tests whose browser or Node does not work."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent))

from programs import fault  # noqa: E402

NEEDS = {  # the programs that a test file runs
    "test_page.py": ("chromium",),
    "test_vscode.py": ("chromium", "node"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for program in NEEDS.get(item.path.name, ()):
            if reason := fault(program, "--version"):
                item.add_marker(pytest.mark.skip(reason=reason))
