"""How tables are printed."""

from rich.console import Console, RenderableType
from rich.measure import Measurement

_WIDTH_MAX = 100_000


def print_whole(console: Console, shown: RenderableType) -> None:
    """Print tables so that nothing is cut: into a pipe at full width, on a terminal with what wraps wrapped.

    What is to be copied, in columns marked `no_wrap`, stays in one piece on any terminal.
    """
    size = console.size
    needed = Measurement.get(console, console.options.update_width(_WIDTH_MAX), shown)
    # The width of one print can only be less than the console's.
    console.width = max(size.width, needed.minimum) if console.is_terminal else needed.maximum
    try:
        console.print(shown, crop=False)
    finally:
        console.size = size
