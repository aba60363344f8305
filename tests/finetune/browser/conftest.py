"""These tests drive a real browser, and are there only where one is; tests/finetune has the same page read without."""

from tests.curate.browser.chromium import PROGRAM

collect_ignore_glob = [] if PROGRAM else ["test_*.py"]
