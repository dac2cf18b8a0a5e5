"""Every code block of the documents runs, every link leads somewhere, and the checker of the built site finds what is broken."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import documents
import pytest
import torch
from documents import Block, Session
from paths import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import check_site

pytest.importorskip("markdown_it")
PAGES = documents.pages()
# Pages whose code is commands on data or machines a test has not got; their blocks may be indented and carry no mark.
WHOLE_PAGES = {
    "docs/data.md": "commands on the reader's own images and others' files: tests/test_cli.py and test_convert.py run them",
    "docs/scale.md": "torchrun over ranks: tests/test_elastic.py runs it",
    "docs/training-ranks.md": "torchrun over ranks: tests/test_torchrun.py and test_training_ranks.py run them",
    "docs/wheels.md": "builds wheels and environments, minutes each: tests/test_packaging.py has what is quick of it",
    "docs/interchange.md": "tests/test_interchange_page.py types it",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def to_run(path: Path) -> list[Block]:
    return [block for block in documents.blocks(path) if block.language in ("python", "sh") and not block.reason]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A reader's empty folder, and the process as it was afterwards."""
    monkeypatch.chdir(tmp_path)
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    yield tmp_path
    torch.set_num_threads(threads)
    torch.random.set_rng_state(state)


@pytest.mark.parametrize("path", [path for path in PAGES if name_of(path) not in WHOLE_PAGES and to_run(path)], ids=name_of)
def test_code_of_a_page_runs_from_top_to_bottom(path: Path, home: Path) -> None:
    session = Session(home)
    for block in to_run(path):
        session.run(block, name_of(path))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_block_is_run_or_says_why_not(path: Path) -> None:
    if name_of(path) in WHOLE_PAGES or "CHANGELOG" in path.name or "NOTES" in path.name:
        return
    for block in documents.blocks(path):
        where = f"{name_of(path)}:{block.line}"
        assert block.language in {"python", "sh"} | documents.SHOWN, f"{where}: expected a fenced block with a language, got {block.language!r}"
        assert len(block.reason) > 10 or not block.reason, f"{where}: a reason of a few words"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    wrong = []
    for link in documents.links(path):
        if "://" in link or link.startswith("mailto:"):
            wrong += [said] if (said := check_site.outside_complaint(link)) else []
            continue
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        if not target.exists():
            wrong.append(f"leads nowhere: {link}")
        elif target.suffix == ".md" and anchor not in documents.anchors(target):
            wrong.append(f"no such anchor: {link}")
    assert not wrong, name_of(path)


def test_commands_of_a_shell_block() -> None:
    text = "# a comment\ncat > a.yaml <<'END'\nx: 1\nEND\nrecog-fast train \\\n  a.yaml\n"
    assert documents.commands(text) == ["cat > a.yaml <<'END'\nx: 1\nEND", "recog-fast train   a.yaml"]


def test_a_failing_block_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"page\.md:3: false"):
        Session(tmp_path).run(Block("sh", "true\nfalse\n", 3), "page.md")
    with pytest.raises(ZeroDivisionError):
        Session(tmp_path).run(Block("python", "1 / 0", 1), "page.md")


def test_site_checker_finds_what_is_broken(tmp_path: Path) -> None:
    good = '<h1 id="one">x</h1><a href="b.html#two">b</a><a href="#one">a</a><a href="https://arxiv.org/abs/1801.07698">p</a>'
    (tmp_path / "a.html").write_text(good)
    (tmp_path / "b.html").write_text('<p id="two"></p><img src="data:image/png;base64,xx">')
    assert check_site.complaints(tmp_path) == []
    broken = {
        '<a href="c.html">': "leads nowhere",
        '<a href="b.html#three">': "no such anchor",
        '<a href="https://files.pypi.example/x">': "a package index",
        '<a href="http://nowhere">': "no valid address",
        '<script src="https://cdn.example.org/x.js"></script>': "loads from elsewhere",
        '<img src="missing.png">': "loads what is not there",
    }
    for text, complaint in broken.items():
        (tmp_path / "a.html").write_text(text)
        (found,) = check_site.complaints(tmp_path)
        assert complaint in found
    (tmp_path / "a.html").write_text(good)
    (tmp_path / "s.css").write_text("@import url('https://fonts.example.org/a.css');")
    assert "loads from elsewhere" in check_site.complaints(tmp_path)[0]
    assert check_site.complaints(tmp_path / "empty") == [f"{tmp_path / 'empty'}: no page"]


def test_expected_numbers_of_the_methods_are_stored() -> None:
    """Every "mean ± spread" that methods.md promises is one that docs/reproduction.md has from stored results."""
    spread = re.compile(r"-?\d+\.\d+ ± \d+\.\d+")
    stored = set(spread.findall((ROOT / "docs" / "reproduction.md").read_text()))
    promised = set(spread.findall((ROOT / "docs" / "methods.md").read_text()))
    assert len(promised) > 20
    assert not {one for one in promised if one not in stored and f"-{one}" not in stored}
