"""`dicomnode` and `python -m dicomnode`: the command line."""

from __future__ import annotations


def main() -> None:
    """Run the command line and leave with one of `errors.Exit`."""
    from dicomnode.cli import app

    app()


if __name__ == "__main__":
    main()
