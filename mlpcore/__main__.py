"""`python -m mlpcore`: the command line."""

from mlpcore.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
