"""The command line. Read `main.py` first; `commands.py` has the commands, `console.py` prints results."""
