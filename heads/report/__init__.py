"""Tables for a person, JSON for a program."""
