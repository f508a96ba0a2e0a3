"""What half a million records cost: to read for the first time, to open again, to pick from, in time and memory.

Records of LLaVA's form in one JSON list, over 5,000 picture files, all made here. Each way reads them in processes of
its own, one thread, the first with an empty cache: this tree (`load_stream` of a YAML file), another checkout
(--against SRC), and two ways that `datasets` has ready: `from_generator`, one record at a time through this tree's
`parse`, and `from_json`, which looks at no record and no picture.
"""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WORDS = (
    "red", "blue", "green", "small", "large", "dog", "cat", "horse", "truck", "ship", "apple", "street", "man", "woman",
    "standing", "left", "right",
)  # fmt: skip
ASK = "Answer the question using a single word or phrase."
PICTURES, PICKS = 5000, 20_000


def make(folder: Path, count: int) -> None:
    """Write pictures, train.json with `count` records, test.json and data.yaml into `folder`."""
    drawn = random.Random(0)
    (folder / "pictures").mkdir()
    for number in range(PICTURES):
        (folder / f"pictures/{number}.jpg").write_bytes(b"\xff\xd8" + bytes(100 + number))
    for name, records in (("train", count), ("test", 10)):
        with (folder / f"{name}.json").open("w") as file:
            for number in range(records):
                question = f"<image>\n{' '.join(drawn.choices(WORDS, k=12))}?\n{ASK}"
                said = [{"from": "human", "value": question}, {"from": "gpt", "value": drawn.choice(WORDS)}]
                record = {"id": number, "image": f"{drawn.randrange(PICTURES)}.jpg", "conversations": said}
                file.write(("," if number else "[") + json.dumps(record) + "\n")
            file.write("]")
    tasks = {"made": {"train": "train.json", "test": "test.json"}}
    (folder / "data.yaml").write_text(json.dumps({"images": "pictures", "tasks": tasks}))


def dymoe_(folder: Path) -> Sequence[Any]:
    """The training samples of the tree on the path."""
    from dymoe.tasks import load_stream
    from dymoe.tasks.source import Source

    return load_stream(str(folder / "data.yaml"), source=Source(validation_share=0)).tasks[0].train


def from_generator(folder: Path) -> Sequence[Any]:
    """A row a record, understood and its picture looked at as this tree does."""
    from datasets import Dataset, Features, Value

    from dymoe.tasks.index import SCHEMA, stable_hash
    from dymoe.tasks.lazy import image_size
    from dymoe.tasks.llava import parse
    from dymoe.tasks.recordfile import read_records

    def rows() -> Any:
        for number, value in enumerate(read_records(folder / "train.json")):
            record = parse(value, False)
            size = image_size(folder / "pictures", str(record.image))
            told = json.dumps({"question_id": record.id, **record.fields, "answer": record.answer})
            row = dict.fromkeys(SCHEMA) | {"record": number, "id": record.id, "image": record.image, "size": size}
            texts = {"question": record.question, "answer": record.answer, "reference": told}
            yield row | texts | {"held": stable_hash(record.id)}

    kinds = Features({name: Value(kind) for name, kind in SCHEMA.items()})
    cache = os.environ["DYMOE_CACHE"]
    return Dataset.from_generator(rows, features=kinds, cache_dir=cache, fingerprint="made")


def from_json(folder: Path) -> Sequence[Any]:
    """The records as `datasets` reads them, types guessed; none is looked at."""
    from datasets import Dataset

    return Dataset.from_json(str(folder / "train.json"), cache_dir=os.environ["DYMOE_CACHE"])


WAYS: dict[str, Callable[[Path], Sequence[Any]]] = {
    "this tree": dymoe_,
    "against": dymoe_,
    "from_generator": from_generator,
    "from_json": from_json,
}


def child(way: str, folder: Path) -> None:
    """Open the records and pick some; print what it took."""
    import datasets

    datasets.disable_progress_bars()
    clocks = (time.perf_counter, time.process_time)

    def took(action: Callable[[], Any]) -> tuple[Any, list[float]]:
        started = [clock() for clock in clocks]
        value = action()
        return value, [clock() - start for clock, start in zip(clocks, started, strict=True)]

    samples, opened = took(lambda: WAYS[way](folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    drawn = random.Random(1)
    _, picked = took(lambda: [samples[drawn.randrange(len(samples))].__class__ for _ in range(PICKS)])
    fingerprint = getattr(samples, "fingerprint", None)
    print(json.dumps({"open": opened, "peak MB": peak, "pick": [each / PICKS for each in picked], "is": fingerprint}))


def main() -> None:
    """Measure and write benchmarks/results/records-*.json."""
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], Path(sys.argv[3]))
        return
    import measure  # here, since it brings torch, whose memory is not that of the records

    parser = measure.parser(__doc__)
    parser.add_argument("--records", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--against", help="src of another checkout")
    options = parser.parse_args()
    found: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        make(Path(place), options.records)
        for number in range(options.rounds):
            for way in WAYS:
                if way == "against" and options.against is None:
                    continue
                source = options.against if way == "against" else str(Path(__file__).parents[1] / "src")
                cache = f"{place}/cache-{number}-{way}"
                env = {**os.environ, "PYTHONPATH": source, "DYMOE_CACHE": cache, "OMP_NUM_THREADS": "1"}
                for time_ in ("first", "second"):
                    command = [sys.executable, __file__, "child", way, place]
                    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
                    row = json.loads(done.stdout.splitlines()[-1])
                    found.setdefault(f"{way}, {time_}", []).append(row)
                    wall, cpu = row["open"]
                    pick = row["pick"][1] * 1e6
                    print(
                        f"{way}, {time_}: {wall:.2f} s, CPU {cpu:.2f} s, {row['peak MB']:.0f} MB, a pick {pick:.0f} us"
                    )
    measure.write("records", options, {"records": found})


if __name__ == "__main__":
    main()
