"""`recog-fast completion SHELL`: a script that completes commands, options and file names, made from the parser itself."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

_BASH = """# recog-fast completion bash >> ~/.bash_completion (zsh: autoload -U bashcompinit && bashcompinit first)
_recog_fast() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} path="" each options
  for each in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case "$path $each" in
{paths}
    esac
  done
  case "$path" in
{cases}
  esac
  if [[ $word == -* || -z $path ]]; then COMPREPLY=($(compgen -W "$options" -- "$word"))
  else COMPREPLY=($(compgen -W "$options" -- "$word") $(compgen -f -- "$word")); fi
}}
complete -o filenames -F _recog_fast recog-fast
"""


def add(commands: Any, parents: list[argparse.ArgumentParser], parser: argparse.ArgumentParser) -> None:
    found = commands.add_parser("completion", parents=parents, help="print a shell's completion script", description=_completion.__doc__)
    found.add_argument("shell", choices=("bash", "zsh", "fish"))
    found.set_defaults(run=lambda options, _: _completion(options, parser))


def _completion(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Prints a completion script: `recog-fast completion bash >> ~/.bash_completion`; fish: `> ~/.config/fish/completions/recog-fast.fish`."""
    tree = dict(_walk(parser, ""))
    print(_fish(tree) if options.shell == "fish" else _bash(tree, options.shell))
    return 0


def _walk(parser: argparse.ArgumentParser, path: str) -> Iterator[tuple[str, list[str]]]:
    """(command path, what may follow: subcommands and options) of the parser and of all below it."""
    words = [o for a in parser._actions for o in a.option_strings]  # argparse shows its actions in no other way
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    yield path, [name for a in below for name in a.choices] + words
    for action in below:
        for name, child in action.choices.items():
            yield from _walk(child, f"{path} {name}".strip())


def _bash(tree: dict[str, list[str]], shell: str) -> str:
    paths = "\n".join(f'    "{path.rpartition(" ")[0]} {path.rpartition(" ")[2]}") path="{path}" ;;' for path in tree if path)
    cases = "\n".join(f'  "{path}") options="{" ".join(words)}" ;;' for path, words in tree.items())
    start = "autoload -U bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return start + _BASH.format(paths=paths, cases=cases)


def _fish(tree: dict[str, list[str]]) -> str:
    lines = []
    for path, words in tree.items():
        names = path.split()
        seen = "; and ".join(f"__fish_seen_subcommand_from {name}" for name in names) or "__fish_use_subcommand"
        for word in words:
            kind = f"-l {word[2:]}" if word.startswith("--") else f"-o {word[1:]}" if word.startswith("-") else f"-a {word}"
            lines.append(f"complete -c recog-fast -n '{seen}' {kind}")
    return "\n".join(lines)
