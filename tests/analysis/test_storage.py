"""What is kept below a run is read back as it was, or refused in one line."""

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dymoe import analysis
from dymoe.analysis.storage import COLUMNS
from dymoe.errors import DymoeError

FRAME = pd.DataFrame([dict.fromkeys(COLUMNS["drift"], 1)]).assign(task="ä|b", part="image", group="a")


def test_there_and_back(tmp_path):
    assert analysis.stored(tmp_path, "drift") is None
    assert analysis.about(tmp_path, "drift") is None
    file = analysis.store(tmp_path, "drift", FRAME[FRAME.columns[::-1]], {"stages": 3, "command": "dymoe analyze"})
    assert file == tmp_path / "analysis" / "drift.parquet"
    found = analysis.stored(tmp_path, "drift")
    pd.testing.assert_frame_equal(found, FRAME[[*COLUMNS["drift"]]], check_dtype=False)
    facts = analysis.about(tmp_path, "drift")
    assert (facts["analysis"], facts["stages"], facts["command"]) == ("drift", 3, "dymoe analyze")
    assert facts["versions"]["torch"]
    assert [path.name for path in file.parent.iterdir()] == ["drift.parquet"]


@pytest.mark.parametrize("content", [b"", b"PAR1 not really", b"x" * 999])
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "analysis").mkdir()
    (tmp_path / "analysis" / "drift.parquet").write_bytes(content)
    with pytest.raises(DymoeError, match=r"drift\.parquet: not a readable parquet file .* again"):
        analysis.stored(tmp_path, "drift")


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "analysis").mkdir()
    table = pa.Table.from_pandas(FRAME)
    for name, metadata in (("plain", {}), ("odd", {b"dymoe": b"[1]"}), ("bad", {b"dymoe": b"{"})):
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "analysis" / "drift.parquet")
        with pytest.raises(DymoeError, match="holds no drift analysis"):
            analysis.stored(tmp_path, "drift"), name
    file = analysis.store(tmp_path, "drift", FRAME, {})
    file.rename(file.with_name("overlay.parquet"))
    with pytest.raises(DymoeError, match="holds no overlay analysis"):
        analysis.stored(tmp_path, "overlay")


def test_unknown_names_and_columns(tmp_path):
    with pytest.raises(DymoeError, match=r"drfit: unknown analysis; did you mean drift\?"):
        analysis.stored(tmp_path, "drfit")
    with pytest.raises(ValueError, match="expected the columns"):
        analysis.store(tmp_path, "drift", FRAME.drop(columns="tokens"), {})
    with pytest.raises(AttributeError, match="no attribute 'drfit'"):
        analysis.drfit  # noqa: B018
