"""`python -m eclectus`: the command line."""

from eclectus.flows.cli.main import main

if __name__ == "__main__":
    main()
