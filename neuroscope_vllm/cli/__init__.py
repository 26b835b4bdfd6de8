"""The `neuroscope` command. One file per command; importing it imports nothing heavy."""
