"""Failures are shown as they happen, so that a run that is cut off has told them."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Where tests are shared by processes, the one that reports is meant."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_AtOnce(config), "failures-at-once")


class _AtOnce:
    """Prints a failure when it is reported."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The name of a test that failed, and where."""
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.write_line(f"\n{report.nodeid} ({report.when})", red=True)
            terminal.write_line(report.longreprtext[-2000:])
