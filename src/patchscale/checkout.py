"""Which commit this package runs from, for the records of runs and benchmarks."""

import subprocess
from pathlib import Path


def checkout() -> tuple[str, bool] | None:
    """The commit of the checkout that this package is of, and whether its files differ; None elsewhere."""
    package = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=package, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        # An environment within a user's own repository is not a checkout of this one: git must know the package.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no", "--", "."))
    except (OSError, subprocess.SubprocessError):
        return None
