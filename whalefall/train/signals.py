"""Stopping a run politely."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM and SIGINT are noted instead of obeyed; yields "was there one?".

    After the first, the next one ends the process at once. Outside the main thread, where Python
    delivers no signals, there never is one.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each in previous:
            signal.signal(each, signal.SIG_DFL)

    is_main = threading.current_thread() is threading.main_thread()
    previous = {
        number: signal.signal(number, note)
        for number in ((signal.SIGTERM, signal.SIGINT) if is_main else ())
    }
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
