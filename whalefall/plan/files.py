"""What comes with the planner: machines, models, claims and assumptions, as files."""

from difflib import get_close_matches
from importlib import resources

DATA = resources.files("whalefall.plan") / "data"


def names_in(folder: str) -> list[str]:
    return sorted(file.name.rsplit(".", 1)[0] for file in (DATA / folder).iterdir())


def nearest_of(name: str, names: list[str]) -> str:
    """``did you mean h800? `` or nothing."""
    near = get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}? " if near else ""
