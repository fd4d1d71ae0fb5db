"""`python -m dsv4cli`: the same program as `dsv4`."""

from dsv4cli.cli import main

if __name__ == "__main__":
    main()
