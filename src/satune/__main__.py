"""``python -m satune`` is the command ``satune``."""

from satune.cli import main

if __name__ == "__main__":
    main()
