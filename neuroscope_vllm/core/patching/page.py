"""The heat map as one HTML file, which asks the network for nothing."""

from __future__ import annotations

from neuroscope_vllm.core.html_page import filled
from neuroscope_vllm.core.patching.heat import ALL, about, column_name, row_name, title
from neuroscope_vllm.core.patching.record import Patching


def heat_page(record: Patching) -> str:
    data = {
        "title": title(record),
        "about": about(record),
        "untouched": record.untouched,
        "columns": [
            *({"name": column_name(record, c), "position": c.position} for c in record.columns),
            {"name": ALL, "position": None},
        ],
        "rows": [
            {
                "name": row_name(row),
                "recovered": [*row.recovered, row.recovered_of_all],
                "metric": [*row.metric, row.metric_of_all],
            }
            for row in record.rows
        ],
    }
    return filled("neuroscope_vllm.core.patching", "page.html", data)
