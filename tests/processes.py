"""Processes that a test started, found again by the session that they belong to."""

from pathlib import Path


def of_session(session: int) -> dict[int, str]:
    """Process id and command line of everything that still runs in a session (``start_new_session=True``)."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            # After the name, which may hold anything: state, parent, process group, session.
            state, _, _, sid = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            command = (folder / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        if int(sid) == session and state != "Z":
            found[int(folder.name)] = command
    return found
