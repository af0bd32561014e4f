"""What the browser and dashboard tests share: the made-up campaign, and a headless browser."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The made-up tables live beside the report's own tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "sae_ext"))

_BROWSERS = ("/usr/bin/chromium-headless-shell", "/usr/bin/chromium")
_ARGUMENTS = (
    "--no-sandbox",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@pytest.fixture(scope="session")
def chromium() -> Iterator[object]:
    """A headless Chromium driven by playwright; the tests skip where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next((path for path in _BROWSERS if Path(path).exists()), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(_BROWSERS)} exists")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(_ARGUMENTS))
        yield browser
        browser.close()
