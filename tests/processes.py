"""Processes that a test started, found again by the session that they belong to."""

import time
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


def wait_until_all_are_gone(session: int, seconds: float = 60) -> None:
    """Let what has been told to end do so, such as the helpers of Ray's dashboard, which look after their parent now and then."""
    deadline = time.monotonic() + seconds
    while (left := of_session(session)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, f"still running: {left}"
