"""Fail skipped tests if CI=true, unless allowed_skips.txt lists them with a reason."""

import os
from collections.abc import Generator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest


def _fail_unless_allowed(report: pytest.TestReport | pytest.CollectReport, config: pytest.Config) -> None:
    if not report.skipped or hasattr(report, "wasxfail") or os.environ.get("CI") != "true":
        return
    patterns = [pattern for pattern, _ in read_allowed(config.rootpath / "tests" / "allowed_skips.txt")]
    if not any(fnmatchcase(report.nodeid, pattern) for pattern in patterns):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: on CI, only what tests/allowed_skips.txt lists may be skipped ({reason})"


def read_allowed(path: Path) -> list[tuple[str, str]]:
    """Return the list's pairs of an `fnmatch` pattern for test ids and a reason."""
    lines = path.read_text(encoding="utf-8").splitlines()
    entries = [line.partition(": ") for line in lines if line and not line.startswith("#")]
    assert all(reason for _, _, reason in entries), f"every entry of {path} gives its reason"
    return [(pattern, reason) for pattern, _, reason in entries]


# Both hooks run in the process that runs the test. pytest-xdist passes the reports on.


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_unless_allowed(report, item.config)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_unless_allowed(report, collector.config)
    return report
