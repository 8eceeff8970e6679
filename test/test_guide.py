# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What README, guide and examples promise is true: programs run, files and commands exist."""

from __future__ import annotations

import argparse
import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest

from torchrl_dvla.recipes.dvla_grpo.settings import compose_settings, to_dict

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs" / "source" / "guide"
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
    last_column = "\n".join(line.split("|")[-2] for line in lines if "|" in line)
    named = re.findall(r"`([^`]*)`", last_column)
    assert len(named) > 80
    assert [name for name in named if not (ROOT / name).is_file()] == []


def commands() -> list[tuple[str, list[str]]]:
    """Calls of the command line in the guide: command and arguments."""
    pages = "".join(path.read_text() for path in sorted(GUIDE.glob("*.md")))
    lines = re.findall(r"^\$ torchrl-dvla (\w+)(.*)$", pages, re.MULTILINE)
    return [(name, shlex.split(rest, comments=True)) for name, rest in lines]


def test_the_guide_calls_commands_that_exist_with_arguments_that_they_take() -> None:
    names = {name for name, _ in commands()}
    assert names >= {"train", "sft", "evaluate", "inspect", "plan", "info", "doctor"}
    for name, arguments in commands():
        overrides = [text for text in arguments if "=" in text and not text.startswith("-")]
        if name in ("train", "sft"):
            configs = {"--config-dir", "conf", "--config-name", "reach", "maniskill", "libero_pi0"}
            configs |= {"libero_cluster", "libero_openvla_oft", "libero_suite", "libero_vla"}
            assert set(arguments) - {*overrides, *configs} <= {"--quick", "-m"}, arguments
        else:
            command = importlib.import_module(f"torchrl_dvla.commands.{name}")
            parser = argparse.ArgumentParser(exit_on_error=False)
            command.add_arguments(parser)
            parser.parse_intermixed_args(arguments)
        if name != "sft" and "-m" not in arguments:
            named = ("maniskill", "libero_cluster", "libero_pi0", "libero_openvla_oft")
            config = next((each for each in named if each in arguments), "libero")
            if config in named[2:]:  # `inspect` is given the folder itself
                overrides = ["policy.path=my/pi0", *overrides]
            compose_settings("toy" if "--quick" in arguments else config, overrides)


def test_the_configuration_of_the_guide_composes(tmp_path: Path) -> None:
    (text,) = re.findall(
        r"```yaml\n# conf/reach.yaml\n(.*?)```", (GUIDE / "recipes.md").read_text(), re.DOTALL
    )
    (tmp_path / "reach.yaml").write_text(text)
    cfg = compose_settings("reach", config_dir=str(tmp_path))
    assert to_dict(cfg)["env"]["base_env"] == {"_target_": "gym_env.Reach"}


# -- the README, and all pages of its kind ------------------------------------------------------
README = (ROOT / "README.md").read_text()
MAX_LINES = 28


def snippet() -> str:
    between = re.search(r"<!-- snippet -->(.*?)<!-- end of snippet -->", README, re.DOTALL)
    assert between is not None
    program = re.fullmatch(r"\s*```python\n(.*?)```\s*", between[1], re.DOTALL)
    assert program is not None
    return program[1]


def test_snippet_is_short() -> None:
    assert len(snippet().splitlines()) <= MAX_LINES


@pytest.mark.slow
@pytest.mark.timeout(330)
def test_snippet_runs(tmp_path: Path, run_python) -> None:
    file = tmp_path / "snippet.py"
    file.write_text(snippet())
    run = run_python(file)
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(r"(update \d+: \d+% success\n){4}", run.stdout), run.stdout
    success = [int(rate) for rate in re.findall(r"(\d+)%", run.stdout)]
    assert success[-1] > success[0] + 10, "it learns"
    assert "Traceback" not in run.stderr
    # nothing is left that somebody would have to clean up
    assert "resource_tracker" not in run.stderr


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "examples/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), f"{page} links to {target}"


def test_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/source/guide/*.md"), *ROOT.glob("examples/*.md")]
    for page in pages:
        for line in page.read_text().splitlines():
            command = re.match(r"\s*\$ make ([a-z ]+)", line)
            mentioned = re.findall(r"`make ([a-z]+)", line)
            used = {*mentioned, *(command[1].split() if command else [])}
            assert used <= targets, f"{page.name}: {line.strip()}"


# -- the examples: from anywhere, on a CPU ------------------------------------------------------
#: What each example prints at the end.
LAST_LINE = {
    "evaluate_while_training.py": r"after: \d+% under policy version 12",
    "gym_env.py": r"update \d+: ([6-9]\d|100)% solved",
    "reacher.py": r"update 1: \d+% solved",
    "timeline.py": r"critical lane: \w+",
    "weights_for_torchrl_collectors.py": r"batch 3: published 3, "
    r"adopted \{'worker 0': 3, 'worker 1': 3\}",
}


def test_every_example_is_tested():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(LAST_LINE)


#: What makes a long one short: it is trained until it is clearly better, not until it is good.
SHORTER = {
    "gym_env.py": ("success_rate < 0.9", "success_rate < 0.6"),
    "reacher.py": ("NUM_UPDATES = 100", "NUM_UPDATES = 1"),
}


@pytest.mark.parametrize("name", sorted(LAST_LINE))
def test_example(name, run_python, tmp_path):
    source = (ROOT / "examples" / name).read_text()
    old, new = SHORTER.get(name, ("", ""))
    assert old in source
    file = tmp_path / name
    file.write_text(source.replace(old, new) if old else source)
    run = run_python(file)
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(LAST_LINE[name], run.stdout.splitlines()[-1]), run.stdout
