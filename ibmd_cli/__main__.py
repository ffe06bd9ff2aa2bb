"""`python -m ibmd_cli` is `ibmd`."""

from ibmd_cli.cli import main

if __name__ == "__main__":
    main()
