"""The subcommands of `reelscale`: each module has a dataclass of its flags and a function `run`."""
