"""Tables of records in the cache of `datasets`, memory-mapped: each is written once for its key.

The library locks a table's folder, writes it aside and moves it into its place when it is whole; two processes that
want the same table write it once. Nothing of ours is imported here, and no `open`, since `datasets` puts its own
functions for remote files into the module of a builder.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import datasets
import pyarrow as pa

ONE_FILE = 1 << 60  # bytes, and no table is as large: a table is known by the path of its one file


class Source(Protocol):
    """What a table is made of."""

    def blocks(self) -> Iterator[Sequence[Mapping[str, Any]]]:
        """The rows, some at a time; asked for only if the table is not in the cache."""

    def summary(self) -> str:
        """A text that is kept with the rows; asked for after the last one."""


class _Table(datasets.ArrowBasedBuilder):
    """What `store` writes."""

    def __init__(self, columns: Mapping[str, str], source: Source, **keys: Any) -> None:
        self._columns, self._source = columns, source
        super().__init__(dataset_name="records", **keys)

    def _info(self) -> datasets.DatasetInfo:
        features = {name: datasets.Value(kind) for name, kind in self._columns.items()}
        return datasets.DatasetInfo(features=datasets.Features(features))

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name="train")]

    def _generate_tables(self) -> Iterator[tuple[int, pa.Table]]:
        schema = self.info.features.arrow_schema
        for number, rows in enumerate(self._source.blocks()):
            columns = {name: [row[name] for row in rows] for name in self._columns}
            yield number, pa.Table.from_pydict(columns, schema=schema)
        self.info.description = self._source.summary()  # a text that the library keeps beside the rows


def store(folder: str, key: str, columns: Mapping[str, str], source: Source) -> tuple[str, str]:
    """The folder with a table's Arrow file, and its summary, both from the cache if it has this key.

    Args:
        folder: of the cache.
        key: what tells this table from others; a word that can be a folder's name.
        columns: their names, and their types as `datasets.Value` knows them.
        source: what the table is made of; what it raises is raised here.

    Raises:
        OSError: the cache cannot be written.
    """
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        builder = _Table(columns, source, cache_dir=folder, config_name=key)
        builder.download_and_prepare(max_shard_size=ONE_FILE)
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None
    finally:
        if bars:
            datasets.enable_progress_bars()
    return builder.cache_dir, builder.info.description


@cache
def open_table(path: str) -> datasets.Dataset:
    """The table in an Arrow file, memory-mapped; one handle per process."""
    return datasets.Dataset.from_file(path)


@cache
def without_pictures(path: str) -> datasets.Dataset:
    """The same without the pictures' bytes."""
    return open_table(path).remove_columns("data")
