"""All that can be asked of a command: names, types, ranges, defaults and help. Imports neither torch nor diffusers."""
