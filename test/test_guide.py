# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Examples of the guide that are written as Python sessions print what the guide says."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "source" / "guide"
PAGES = [path.name for path in sorted(GUIDE.glob("*.md")) if "```pycon" in path.read_text()]


def test_there_is_a_page_with_a_session() -> None:
    assert "memory.md" in PAGES


@pytest.mark.parametrize("page", PAGES)
def test_sessions_print_what_the_page_says(page: str) -> None:
    session = "\n".join(re.findall(r"```pycon\n(.*?)```", (GUIDE / page).read_text(), re.DOTALL))
    test = doctest.DocTestParser().get_doctest(session, {}, page, str(GUIDE / page), 0)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert test.examples
    output: list[str] = []
    outcome = doctest.DocTestRunner(optionflags=flags).run(test, out=output.append)
    assert outcome.failed == 0, "".join(output)


def test_every_check_names_a_test_file_that_exists() -> None:
    lines = (GUIDE / "checks.md").read_text().splitlines()
    named = re.findall(
        r"`([^`]*)`", "\n".join(line.split("|")[-2] for line in lines if "|" in line)
    )
    assert len(named) > 80
    assert [name for name in named if not (GUIDE.parents[2] / name).is_file()] == []
