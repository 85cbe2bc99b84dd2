"""`python -m alphatoken_curate`: the command line."""

from alphatoken_curate.cli.main import main

if __name__ == "__main__":
    main()
