"""Commands in a TOML file, in order, and what they are expected to take."""
