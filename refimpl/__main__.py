"""``python -m refimpl`` is ``refimpl``."""

from refimpl.cli import main

if __name__ == "__main__":
    main()
