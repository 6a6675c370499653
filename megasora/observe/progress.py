"""Progress of long work: a bar on a terminal, a line a while otherwise. Always on stderr."""

import sys
import time
from types import TracebackType

from tqdm import tqdm


class Progress:
    """`progress(done, total, what)` as often as one likes. What is done at the first call took none of this one's time."""

    SECONDS = 10.0  # between lines where there is no terminal

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: tqdm | None = None
        self.terminal = sys.stderr.isatty()
        self.begin = self.spoke = time.monotonic()
        self.first: tuple[int, float] | None = None  # what was done at the first call, and when that was

    def __enter__(self) -> "Progress":
        return self

    def __call__(self, done: int, total: int, what: str) -> None:
        if self.terminal:
            if self.bar is None:
                self.bar = tqdm(total=total, initial=done, desc=self.name, file=sys.stderr, leave=True)
            self.bar.total = total
            self.bar.n = done
            self.bar.set_postfix_str(what)
            return
        now = time.monotonic()
        first, since = self.first = self.first or (done, now)
        if now - self.spoke >= self.SECONDS or done == total:
            self.spoke = now
            soon = f" ({now - self.begin:.0f} s)" if done == total else ""
            if first < done < total:
                soon = f" (about {(now - since) / (done - first) * (total - done):.0f} s left)"
            print(f"{self.name}: {done}/{total} {what}{soon}".replace("  ", " "), file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
