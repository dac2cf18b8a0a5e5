"""Commands of the command line beyond training: `add(commands, parents)` of each module registers its own."""
