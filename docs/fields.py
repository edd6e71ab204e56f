"""Shows the comments beside the fields of dataclasses in the API reference (an extension of griffe)."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Fields(griffe.Extension):
    """Adds to the docstring of each dataclass a table of its fields, whose words are the comments in the source."""

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        if not any("dataclass" in str(decorator.value) for decorator in cls.decorators):
            return
        lines = cls.filepath.read_text().splitlines()
        rows = []
        for name, field in cls.members.items():
            if field.is_attribute and not field.is_alias and "property" not in field.labels and name[0] != "_":
                text = "\n".join(lines[field.lineno - 1 : field.endlineno + 1])
                found = re.match(r"[^\n#]*(?:\n[^\n#]*?)?  # ([^\n]*)", text.split("\n    def ")[0])
                default = "" if field.value is None else f" Default: `{field.value}`."
                words = f"{found.group(1).rstrip('.')}." if found else ""
                rows.append(f"  {name}: {words}{default}")
        if rows and cls.docstring is not None:
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(rows)
