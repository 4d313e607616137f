"""``python -m satune`` is the command ``satune``."""

from satune.cli.main import main

if __name__ == "__main__":
    main()
