"""Defaults of the report, apart from its slow imports, because `--help` shows them."""

DEFAULT_NAME = "report.html"
ITEMS = 12
