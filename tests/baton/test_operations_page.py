import importlib.util
import re

from baton.subprocess_module import CODE_ROOT


def load_tables():
    spec = importlib.util.spec_from_file_location(
        "operations_tables", CODE_ROOT / "docs" / "operations_tables.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_setting_and_every_metric_is_on_the_operations_page():
    tables = load_tables()
    text = tables.PAGE.read_text()
    assert tables.rendered(text) == text, "run python docs/operations_tables.py"


def test_the_page_shows_every_table_there_is():
    tables = load_tables()
    shown = re.findall(r"<!-- table: (\S+) -->", tables.PAGE.read_text())
    assert sorted(shown) == sorted(tables.build_tables())
