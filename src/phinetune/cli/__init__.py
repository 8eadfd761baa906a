"""The command line: one thin file per command. Parses, calls the lower floors, shows what comes back."""
