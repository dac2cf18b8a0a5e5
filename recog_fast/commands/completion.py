"""`recog-fast completion SHELL`: a script that completes commands, options, choices, settings and file names, made from the parser itself."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from recog_fast.terminal.console import Commands, actions_of, parsers_of

_BASH = """# recog-fast completion bash >> ~/.bash_completion (zsh: autoload -U bashcompinit && bashcompinit first)
_recog_fast() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} path="" each options
  for each in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case "$path $each" in
{paths}
    esac
  done
  case "$path ${{COMP_WORDS[COMP_CWORD-1]}}" in
{values}
  esac
  case "$path" in
{cases}
  esac
  if [[ $word == -* || -z $path ]]; then COMPREPLY=($(compgen -W "$options" -- "$word"))
  else COMPREPLY=($(compgen -W "$options" -- "$word") $(compgen -f -- "$word")); fi
}}
complete -o filenames -F _recog_fast recog-fast
"""


@dataclass(frozen=True)
class _Command:
    """What may follow a command: subcommands and choices at places of their own, options with their choices."""

    words: list[str]
    options: dict[str, list[str]]


def add(commands: Commands, parents: list[argparse.ArgumentParser], parser: argparse.ArgumentParser) -> None:
    """Registers `completion`, of the commands of `parser`."""
    found = commands.add_parser(
        "completion", parents=parents, help="print a shell's completion script", description=_completion.__doc__,
        example=("recog-fast completion bash >> ~/.bash_completion", "recog-fast completion fish > ~/.config/fish/completions/recog-fast.fish"),
    )  # fmt: skip
    found.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell the script is for")
    found.set_defaults(run=lambda options, _: _completion(options, parser))


def _completion(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Prints a script with which the shell completes commands, options, their choices, settings of training and file names. Put it where
    the shell looks: ~/.bash_completion, or ~/.config/fish/completions/recog-fast.fish."""
    from recog_fast.training.config import setting_names

    tree = {path: _command(below) for path, below in parsers_of(parser)}
    for path in ("train", "sweep"):
        tree[path].options.update((f"--{name}", []) for name in setting_names())
    print(_fish(tree) if options.shell == "fish" else _bash(tree, options.shell))
    return 0


def _command(parser: argparse.ArgumentParser) -> _Command:
    words: list[str] = []
    options: dict[str, list[str]] = {}
    for action in actions_of(parser):
        choices = [str(choice) for choice in action.choices or ()]
        if action.option_strings:
            options.update((option, choices) for option in action.option_strings)
        else:
            words += choices
    return _Command(words, options)


def _bash(tree: dict[str, _Command], shell: str) -> str:
    paths = "\n".join(f'    "{path.rpartition(" ")[0]} {path.rpartition(" ")[2]}") path="{path}" ;;' for path in tree if path)
    values = "\n".join(
        f'    "{path} {option}") COMPREPLY=($(compgen -W "{" ".join(choices)}" -- "$word")); return ;;'
        for path, command in tree.items() for option, choices in command.options.items() if choices
    )  # fmt: skip
    cases = "\n".join(f'  "{path}") options="{" ".join([*command.words, *command.options])}" ;;' for path, command in tree.items())
    start = "autoload -U bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return start + _BASH.format(paths=paths, values=values, cases=cases)


def _fish(tree: dict[str, _Command]) -> str:
    lines = []
    for path, command in tree.items():
        seen = "; and ".join(f"__fish_seen_subcommand_from {name}" for name in path.split()) or "__fish_use_subcommand"
        start = f"complete -c recog-fast -n '{seen}'"
        lines += [f"{start} -a {word}" for word in command.words]
        for option, choices in command.options.items():
            kind = f"-l {option[2:]}" if option.startswith("--") else f"-o {option[1:]}"
            lines.append(f"{start} {kind}" + (f" -x -a '{' '.join(choices)}'" if choices else ""))
    return "\n".join(lines)
