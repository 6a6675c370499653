"""Does `megasora bench --against` see a step that has become a tenth slower, and let the same code pass?

  python benchmarks/regressions.py --json benchmarks/reports/DATE-regressions.json
  python benchmarks/regressions.py --repeats 3 --seeded 3 --bench.rounds=12 --model.depth=4

One bench of the config is kept as the old result. Then the same code is benched again so often, and in turn with it code that
sleeps for a tenth of its step within the update, each in processes of its own. What the command exits with is what counts.
A matrix product carries what slows all work alike; of a machine on which others run too, this has to have a core first, as by
`setsid -w bash -c 'echo -20 > /proc/self/autogroup; taskset -c 1 python benchmarks/regressions.py'`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
SEEDED = "--seeded-slowdown"


def slowed(share: float, argv: list[str]) -> int:
    """The command line `argv`, with an update that sleeps for a share of what the step has taken until its end."""
    from megasora.cli import main
    from megasora.engines.torch_native import TorchNative

    compute, plain, begin = TorchNative.forward_backward, TorchNative.update, 0.0

    def forward_backward(self: TorchNative, rows: Sequence[Any], loss: Callable[..., Any]) -> Any:
        nonlocal begin
        begin = time.perf_counter()
        return compute(self, rows, loss)

    def update(self: TorchNative, lr: float) -> None:
        plain(self, lr)
        time.sleep(share * (time.perf_counter() - begin))

    TorchNative.forward_backward, TorchNative.update = forward_backward, update  # type: ignore[method-assign, assignment]
    return main(argv)


def bench(command: Sequence[str], seeded: float, words: Sequence[str]) -> dict[str, Any]:
    """Runs it; the exit code, what it said of the comparison, and the rounds."""
    slow = [str(Path(__file__).resolve()), SEEDED, str(seeded)] if seeded else ["-m", "megasora"]
    done = subprocess.run([sys.executable, *slow, *command, *words], capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(done.stderr.strip())
    result = json.loads(done.stdout)
    said = next((line for line in done.stderr.splitlines() if "step_time_s: " in line), "")
    return {
        "exit": done.returncode, "said": said.removeprefix("megasora: "), "step_time_s": result["step_time_s"],
        "mfu_gemm": result["mfu_gemm"], "warmup": result["warmup"], "costs": [one["cost"] for one in result["rounds"]],
        "machine": result["machine"], "load": os.getloadavg()[0],
    }  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == [SEEDED]:
        sys.exit(slowed(float(sys.argv[2]), sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--repeats", type=int, default=10, help="of the same code")
    parser.add_argument("--seeded", type=int, default=10, help="of the slower code")
    parser.add_argument("--share", type=float, default=0.1, help="of the step, by which it is slower")
    parser.add_argument("--note", default="", help="how it was started, for the report")
    parser.add_argument("--json", type=Path)
    args, overrides = parser.parse_known_args()
    command = ["bench", "--config", str(args.config), "--data=synthetic", "--json", *overrides]
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        old = Path(directory) / "old.json"
        first = bench(command, 0.0, [f"--bench.output={old}"])
        for number in range(max(args.repeats, args.seeded)):
            for share, count in ((0.0, args.repeats), (args.share, args.seeded)):
                if number < count:
                    found = bench(command, share, [f"--bench.against={old}"])
                    runs.append({"seeded": share, **found})
                    name = "slower" if share else "same"
                    print(f"{name:<7} exit {found['exit']}  {found['said'].replace(str(old), 'OLD')}", flush=True)
    same, slower = ([run for run in runs if bool(run["seeded"]) is kind] for kind in (False, True))
    passed, caught = sum(run["exit"] == 0 for run in same), sum(run["exit"] == 1 for run in slower)
    print(
        f"the same code: {passed} of {len(same)} pass; a step {100 * args.share:g} % slower: {caught} of {len(slower)} caught"
    )
    if args.json:
        facts = {"date": str(date.today()), "command": sys.argv[1:], "note": args.note, "python": platform.python_version(),
                 "passed": f"{passed} of {len(same)}", "caught": f"{caught} of {len(slower)}", "old": first}  # fmt: skip
        args.json.write_text(json.dumps(facts | {"runs": runs}, indent=1) + "\n")
    if passed < len(same) or caught < len(slower):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
