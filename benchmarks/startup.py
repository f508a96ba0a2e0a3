"""Seconds until `dymoe --help` has answered and until `import dymoe` is done, each in processes of their own."""

import subprocess
import sys

import measure
from measure import interleaved, spread, write

COMMANDS = {
    "dymoe --help": [sys.executable, "-m", "dymoe", "--help"],
    "import dymoe": [sys.executable, "-c", "import dymoe"],
    "import dymoe; dymoe.DyMoEConfig": [sys.executable, "-c", "import dymoe; dymoe.DyMoEConfig"],
    "python -c pass": [sys.executable, "-c", "pass"],
}


def main() -> None:
    """Measure and write benchmarks/results/startup-*.json."""
    parser = measure.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    actions = {
        name: lambda command=command: subprocess.run(command, check=True, capture_output=True)
        for name, command in COMMANDS.items()
    }
    times = interleaved(actions, options.rounds, warmup=1)
    write("startup", options, {"seconds": {name: spread(values) for name, values in times.items()}})


if __name__ == "__main__":
    main()
