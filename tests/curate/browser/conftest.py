"""These tests drive a real browser, and are there only where one is; tests/curate has the same pages read without."""

from tests.curate.browser.chromium import PROGRAM

collect_ignore_glob = [] if PROGRAM else ["test_*.py"]
