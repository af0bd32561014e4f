"""How several processes share the tests (`pytest -n`, as `make test` has it): a file is run by one of them,
and all that starts servers, clusters or browsers by the same one, in order."""

from __future__ import annotations

from pathlib import Path

import pytest

_ROOT = Path(__file__).parent
_SERVERS = {"flows", "workers", "dashboard"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        path = item.path.relative_to(_ROOT)
        group = "servers" if path.parts[0] in _SERVERS else str(path)
        item.add_marker(pytest.mark.xdist_group(group))
