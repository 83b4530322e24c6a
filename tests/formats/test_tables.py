"""Tables of every format give the same text, and what is no table is one line that says where."""

import datetime

import pyarrow
import pytest
from pyarrow import parquet

from featcache.errors import DataError
from featcache.formats.tables import column_names, read_table

COLUMNS = {"id": ("13", "", "7"), "name": ("a,b", "é", "")}
TEXTS = {
    "commas.csv": 'id,name\n13,"a,b"\n,é\n7,\n',
    "byte_order_mark_semicolons_and_windows.csv": "\ufeffid;name\r\n13;a,b\r\n;é\r\n7;\r\n",
    "tabs.csv": "id\tname\n13\ta,b\n\té\n7\t",
    "tabs.TSV": "id\tname\n13\ta,b\n\té\n7\t\n",
    "spaces_and_blank_lines.csv": 'id , name\n13, "a,b"\n\n, é\n7,\n\n',
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_with_any_separator_is_the_same_table(tmp_path, name):
    (tmp_path / name).write_text(TEXTS[name], encoding="utf-8", newline="")
    table = read_table(tmp_path / name)
    assert (table.path, table.columns, len(table)) == (tmp_path / name, COLUMNS, 3)


def test_cells_may_hold_lines(tmp_path):
    (tmp_path / "a.csv").write_text('x,y\n"1\n2",3\n')
    assert read_table(tmp_path / "a.csv").columns == {"x": ("1\n2",), "y": ("3",)}


BROKEN = {
    "x,y\n1,2\n\n3\n": "expected 2 cells in every row, one for each column; found 1 in line 4",
    "x,y\n1,2,3\n": "found 3 in line 2",
    'x,y\n"1\n2",3\n4\n': "found 1 in line 4",
    "x,x\n1,2\n": "found two of the name 'x'",
    ",x\n0,2\n": "found column 1 without one; name it, or save the table without the index",
    "x,y\n": "expected rows below the names of the columns; found none",
    "\n\n": "found no column",
    'x,y\n"1,2\n': "unexpected end of data",
}


@pytest.mark.parametrize("text", BROKEN)
def test_text_that_is_no_table_is_refused(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=BROKEN[text]) as error:
        read_table(tmp_path / "a.csv")
    assert error.value.where == str(tmp_path / "a.csv")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_other_encodings_are_named(tmp_path, encoding):
    (tmp_path / "a.csv").write_bytes("x,y\n1,é\n".encode(encoding))
    with pytest.raises(DataError, match="expected text in UTF-8; found another encoding"):
        read_table(tmp_path / "a.csv")


def test_parquet_gives_the_text_of_its_values(tmp_path):
    columns = {
        "int": pyarrow.array([13, None], pyarrow.int64()),
        "float": pyarrow.array([13.0, 0.25], pyarrow.float64()),
        "nan": pyarrow.array([float("nan"), 2e9], pyarrow.float32()),
        "large": pyarrow.array([2**53 + 1, 0], pyarrow.uint64()),
        "dictionary": pyarrow.array(["a", None]).dictionary_encode(),
        "bool": [True, False],
        "date": [datetime.date(2020, 1, 2), None],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet").columns == {
        "int": ("13", ""),
        "float": ("13", "0.25"),
        "nan": ("", "2000000000"),
        "large": ("9007199254740993", "0"),
        "dictionary": ("a", ""),
        "bool": ("True", "False"),
        "date": ("2020-01-02", ""),
    }


def test_parquet_that_is_no_table_of_text_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    broken = {
        "text or numbers in column 'x'; found lists": pyarrow.table({"x": [[1, 2]]}),
        "text or numbers in column 'x'; found bytes": pyarrow.table({"x": [b"a"]}),
        "found none": pyarrow.table({"x": pyarrow.array([], pyarrow.int64())}),
        "found no column": pyarrow.table({}),
        "two of the name 'x'": pyarrow.table([[1], [2]], names=["x", "x"]),
    }
    for message, table in broken.items():
        parquet.write_table(table, path)
        with pytest.raises(DataError, match=message):
            read_table(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match="expected a Parquet file that can be read"):
        read_table(path)


def test_a_column_that_is_missing_is_answered_with_the_nearest(tmp_path):
    (tmp_path / "a.csv").write_text("Image_ID,file\n1,a.png\n")
    table = read_table(tmp_path / "a.csv")
    assert table.column("file") == ("a.png",)
    with pytest.raises(DataError, match=r"found the columns 'Image_ID', 'file'; did you mean 'Image_ID'\?"):
        table.column("image_id")
    with pytest.raises(DataError, match="name one of these"):
        table.column("subject")


def test_other_files_are_refused(tmp_path):
    for name, message in {"a.xlsx": "found another ending, and no such file", "a.csv": "found none"}.items():
        with pytest.raises(DataError, match=message):
            read_table(tmp_path / name)


def test_names_of_columns_are_read_without_the_rows(tmp_path):
    (tmp_path / "a.csv").write_text("\ufeffid; x\n1;2\n", encoding="utf-8")
    assert column_names(tmp_path / "a.csv") == ["id", "x"]
    assert column_names(tmp_path / "none.csv") == [] == column_names(tmp_path / "a.npy")
