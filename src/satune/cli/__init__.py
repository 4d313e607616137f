"""The commands, a module each. Results go to standard output, everything else to standard error."""
