"""numba-cuda's own tests of its driver layer, as they come in its wheel; the result of each in a file.

    numba_suite.py RESULTS.json [LAST]

RESULTS.json: {"driver": [major, minor], "tests": {ID: {"outcome": "passed" | "failed" | "skipped", "why": "..."}}}.
An ID is FILE::CLASS::TEST. `why` is the error's last line, or why the test skips itself. Exit code 0 if the tests
ran to the end, whatever their outcomes; another if they could not be run.

LAST is a file of tests that run after all others, in its order: one that fails in the middle of a capture leaves the
capture open, and numba keeps what it belongs to. A line is an ID, spaces, and a reason; `#` begins a comment.
"""

import importlib
import json
import os
import sys

import pytest

SUITE = "numba.cuda.tests.cudadrv"


class TestModule(pytest.Module):
    """A file of tests under its real name, which processes that a test starts can import too."""

    def _getobj(self):
        return importlib.import_module(f"{SUITE}.{self.path.stem}")


class Results:
    """Collects; see the module."""

    def __init__(self, last):
        self.tests = {}
        self.last = last

    def pytest_collect_directory(self, path, parent):
        # Not as packages: pytest would import them by the wheel's folders, which hide `cuda`.
        return pytest.Dir.from_parent(parent, path=path)

    def pytest_pycollect_makemodule(self, module_path, parent):
        return TestModule.from_parent(parent, path=module_path)

    @pytest.fixture(scope="class")
    def initialize_from_pytest_config(self, request):
        """The suite's repository has this in a conftest.py that the wheel lacks."""
        request.cls._dump_failed_filechecks = False

    def pytest_collection_modifyitems(self, items):
        for item in items:
            self.tests[short(item.nodeid)] = {"outcome": "not run", "why": ""}
        place = {name: index for index, name in enumerate(self.last)}
        items.sort(key=lambda item: place.get(short(item.nodeid), -1))

    def pytest_runtest_logreport(self, report):
        result = self.tests[short(report.nodeid)]
        if report.failed:
            # Also a failed subtest, set-up or tear-down.
            result.update(outcome="failed", why=last_line(report))
        elif result["outcome"] == "not run" and report.skipped:
            result.update(outcome="skipped", why=reason(report))
        elif result["outcome"] == "not run" and report.when == "call":
            result.update(outcome="passed")


def short(nodeid):
    return nodeid.rsplit("/", 1)[-1]


def last_line(report):
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    return text.strip().splitlines()[0] if text.strip() else ""


def reason(report):
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return getattr(report, "wasxfail", str(report.longrepr))


def listed(path):
    with open(path, encoding="utf-8") as file:
        return [line.split()[0] for line in file if line.strip() and not line.startswith("#")]


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    import numba.cuda.tests.cudadrv as suite

    results = Results(listed(sys.argv[2]) if sys.argv[2:] else [])
    folder = os.path.dirname(suite.__file__)
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "--rootdir", folder, folder]
    code = pytest.main(options, plugins=[results])
    from cuda.bindings import driver

    version = driver.cuDriverGetVersion()[1]
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        found = {"driver": [version // 1000, version % 1000 // 10], "tests": results.tests}
        json.dump(found, file, indent=1, sort_keys=True)
    # 1: some failed, which is for the reader of the results to judge.
    sys.exit(0 if code in (0, 1) and results.tests else int(code) or 1)


if __name__ == "__main__":
    # Processes that a test starts import this file: they must not run the tests again.
    main()
