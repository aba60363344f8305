"""A tiny dataset and architectures, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.export import check
from tests.finetune import tiny
from tests.finetune.users import Users


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session")
def architectures(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("architectures")
    return {name: str(tiny.write_architecture(name, folder)) for name in tiny.ARCHITECTURES}


@pytest.fixture(autouse=True, scope="session")
def fresh_process(tmp_path_factory):
    """How an export is really loaded in a fresh process; in most tests the process is forked, ready to use it."""
    users, real = Users(tmp_path_factory.mktemp("users")), check._in_fresh_process
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "_in_fresh_process", users)
        yield real
    users.close()
