"""README.md and the pages of docs/ are true: their Python runs, and the links, targets, commands and files exist."""

import pathlib
import re

import pytest

from longattn import cli

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {str(p.relative_to(ROOT)): p for p in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])}
BY_PAGE = pytest.mark.parametrize("page", PAGES)
FOLDERS = "longattn|configs|notebooks|experiments|tests|docs"


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def prose(text: str) -> list[str]:
    """The lines outside tables and fenced blocks."""
    return [line for line in re.sub(r"(?ms)^```.*?^```", "", text).splitlines() if not line.startswith("|")]


def anchors(text: str) -> set[str]:
    """The anchors that Markdown renderers make from the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"(?ms)^```.*?^```", "", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}


def commands(text: str) -> set[str]:
    """The commands of longattn named in shell blocks and in code spans."""
    shell = "\n".join(blocks(text, "sh"))
    named = re.findall(r"(?m)^(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?longattn (\w+)", shell)
    return set(named) | set(re.findall(r"`longattn (\w+)", re.sub(r"(?ms)^```.*?^```", "", text)))


# ---- the README


def test_readme_is_short():
    assert len(README.splitlines()) <= 150
    assert max(map(len, prose(README))) <= 120
    assert max(len(line) for line in README.splitlines() if not line.startswith("|")) <= 200


def test_readme_shows_the_library_in_fifteen_lines():
    first, *_ = blocks(README, "python")
    assert sum(1 for line in first.splitlines() if line.strip()) <= 16


def test_readme_names_the_main_commands():
    assert {"train", "eval", "compare", "plan", "profile", "bringup"} <= commands(README)


def test_readme_names_a_command_and_a_page_for_each_question():
    table = README.split("## Which question do you have?")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\|.*\|$", table, re.MULTILINE)
    ]
    assert rows[0] == ["question", "command", "answer"]
    assert len(rows) > 10
    for question, command, answer in rows[2:]:
        assert question.endswith("?")
        (words,) = re.findall(r"^`([^`]+)`$", command)
        if words.startswith("make "):
            assert words.split()[1] in targets(), command
        elif words.startswith("longattn."):
            assert getattr(__import__("longattn"), words.removeprefix("longattn.")), command
        else:
            _, name, *rest = words.split()
            assert name in cli.COMMANDS and (name != "profile" or rest[0] in cli.PROFILES), command
        (page,) = re.findall(r"^\[[^\]]+\]\((docs/\w+\.md)\)$", answer)
        assert (ROOT / page).is_file()


# ---- every page


@pytest.mark.parametrize(
    "page",
    [page if page in ("README.md", "docs/index.md") else pytest.param(page, marks=pytest.mark.slow) for page in PAGES],
)
def test_python_blocks_run(page):
    namespace: dict[str, object] = {}
    for block in blocks(PAGES[page].read_text(), "python"):
        exec(compile(block, page, "exec"), namespace)


@BY_PAGE
def test_links_resolve(page):
    text = re.sub(r"(?ms)^```.*?^```", "", PAGES[page].read_text())
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (PAGES[page].parent / path) if path else PAGES[page]
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def targets() -> set[str]:
    """The targets of the Makefile."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@BY_PAGE
def test_make_targets_exist(page):
    named = re.findall(r"(?:^|`)make ((?:[a-z-]+ ?)+)", PAGES[page].read_text(), re.MULTILINE)
    if page != "CHANGELOG.md":  # its old targets are gone
        assert {word for words in named for word in words.split()} <= targets()


@BY_PAGE
def test_commands_exist(page):
    text = PAGES[page].read_text()
    if page != "CHANGELOG.md":  # its old commands are gone
        assert commands(text) <= set(cli.COMMANDS)


@BY_PAGE
def test_files_exist(page):
    for path in set(re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", PAGES[page].read_text())):
        if page != "CHANGELOG.md" and path != "experiments/bringup/":  # made by the first report
            assert (ROOT / path).exists(), path


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert pages == set(re.findall(r"[\w/]+\.md", menu))


# ---- what is written in two places


def test_ruff_has_one_version():
    pinned = re.search(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)
    hooks = re.findall(r"ruff==([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert set(hooks) == {pinned}


def test_citation_has_the_version_of_the_package():
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_workflow_runs_what_ci_runs():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.findall(r"^ *- run: (.*)$", workflow, re.MULTILINE) == [".ci/run"]
