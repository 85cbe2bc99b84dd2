"""`python -m alphatoken_curate`: the command line."""

from pathlib import Path

import alphatoken_curate

_HERE = Path(__file__).parent

if not (_HERE / "cli").is_dir() and (_HERE.parent / "cli" / "main.py").is_file():
    # In a clone Python finds the sources before what is installed, and their cli/ stands beside the package.
    alphatoken_curate.__path__.append(str(_HERE.parent))

from alphatoken_curate.cli.main import main  # noqa: E402

if __name__ == "__main__":
    main()
