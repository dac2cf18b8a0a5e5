"""`recog-fast completion`: the scripts complete what the parser knows, in the shell itself where it is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

_ASK = 'COMP_WORDS=(recog-fast {words}); COMP_CWORD={last}; _recog_fast; printf "%s\\n" "${{COMPREPLY[@]}}"'


def script(shell: str) -> str:
    command = [sys.executable, "-m", "recog_fast", "completion", shell]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "expected", "others"),
    [
        ('""', {"train", "eval", "completion"}, {"check", "--target"}),
        ("da", {"data"}, {"train"}),
        ('data ""', {"check", "convert"}, {"train"}),
        ("eval --t", {"--target"}, {"--json"}),
        ("data check --j", {"--json"}, {"train"}),
        ('data check x --kind ""', {"rec", "folder", "zip"}, {"--json", "train"}),
        ("export x y --normalize in", {"inside"}, {"outside", "--json"}),
        ("train a.yaml --data.h", {"--data.holdout_classes"}, {"--data.kind", "--json"}),
        ("demo --q", {"--quick"}, {"--output"}),
        ('completion ""', {"bash", "zsh", "fish"}, {"train"}),
    ],
)
def test_bash_completes(words: str, expected: set[str], others: set[str], once: dict[str, str]) -> None:
    ask = _ASK.format(words=words, last=len(words.split()))
    done = subprocess.run(["bash", "-c", once["bash"] + ask], capture_output=True, text=True, check=True)
    found = set(done.stdout.split())
    assert expected <= found, done.stderr
    assert not others & found


@pytest.fixture(scope="module")
def once() -> dict[str, str]:
    return {"bash": script("bash")}


def test_fish_and_zsh_know_the_same_commands() -> None:
    fish = script("fish")
    assert "-a train" in fish and "-l kind -x -a 'rec folder list zip tar'" in fish and "-l data.holdout_classes" in fish
    assert "bashcompinit" in script("zsh") and "train" in script("zsh")


def test_a_reader_that_has_enough_is_no_error() -> None:
    command = f"{sys.executable} -m recog_fast completion bash | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
