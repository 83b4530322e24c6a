"""The commands of the command line, one function each: options -> settings -> a Job."""
