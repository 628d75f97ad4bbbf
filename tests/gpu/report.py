"""The GPU check's figures as shares of the device's peak rate, and as Markdown."""

from typing import Any

from common import Row

GIB = 2**30
PEAK_TFLOPS = {  # dense, from the makers' data sheets; the first name that the device's begins or goes on with counts
    "H200": {"bf16": 989.4, "tf32": 494.7, "fp32": 66.9},
    "H100 PCIe": {"bf16": 756.0, "tf32": 378.0, "fp32": 51.2},
    "H100 NVL": {"bf16": 835.0, "tf32": 417.5, "fp32": 60.0},
    "H100": {"bf16": 989.4, "tf32": 494.7, "fp32": 66.9},
    "A100": {"bf16": 312.0, "tf32": 156.0, "fp32": 19.5},
    "L40S": {"bf16": 362.1, "tf32": 183.2, "fp32": 91.6},
    "L4": {"bf16": 121.0, "tf32": 60.0, "fp32": 30.3},
}


def with_shares(rows: list[Row]) -> list[Row]:
    """Return the rows with operations a second, as shares of the data sheet's rate and of a matrix product's.

    The data sheet's share is None for a device that is not in PEAK_TFLOPS.
    """
    device = next((row.get("name", "") for row in rows if row["what"] == "device"), "")
    sheet: dict[str, float] = next((rates for name, rates in PEAK_TFLOPS.items() if name in device), {})
    product = {row["arithmetic"]: row["flops_per_second"] for row in rows if row["what"].startswith("matrix product")}
    shared = []
    for row in rows:
        if "arithmetic" in row and "seconds" in row and "flops" in row:
            rate = row["flops"] / row["seconds"]
            peak, reached = sheet.get(row["arithmetic"]), product.get(row["arithmetic"])
            row = row | {"flops_per_second": rate}
            row["share_of_peak"] = rate / (peak * 1e12) if peak else None
            row["share_of_product"] = rate / reached if reached else None
        shared.append(row)
    return shared


def page(record: dict[str, Any]) -> str:
    """Return the figures as Markdown, to be put into docs/performance.md."""
    rows = record["rows"]
    device = next((row for row in rows if row["what"] == "device"), {})
    name = device.get("name", device.get("device", "?"))
    lines = [
        f"{name}, torch {device.get('torch', '?')}, preset {record['preset']}, {record['seconds']:.0f} s in all.",
        "",
        "| | s | a second | TFLOP/s | of the peak | of a product | peak GiB | planned GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "planned_bytes" in row:
            a_second = row.get("samples_per_second", 1 / row["seconds"])
            cells = [row["what"], _number(row["seconds"]), _number(a_second), _number(row["flops_per_second"] / 1e12)]
            cells += [_percent(row["share_of_peak"]), _percent(row["share_of_product"])]
            lines.append(_line(*cells, _gib(row["peak_bytes"]), _gib(row["planned_bytes"])))
        elif row["what"].startswith("matrix product"):
            lines.append(_line(row["what"], "", "", _number(row["flops_per_second"] / 1e12), "", "", "", ""))
    lines += [
        "",
        "| forward and backward | first s | s | largest difference to fp32 | peak GiB |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row["measure"].startswith("arithmetic") and "error" not in row:
            cells = [row["what"], _number(row["first_seconds"]), _number(row["seconds"])]
            lines.append(_line(*cells, f"{row['difference']:.1e}", _gib(row["peak_bytes"])))
    lines += ["", "| against the CPU | difference | tolerance |", "|---|---|---|"]
    for row in rows:
        if "tolerance" in row:
            lines.append(_line(row["what"], f"{row['difference']:.1e}", f"{row['tolerance']:g}"))
    extra = [row for row in rows if row["measure"].startswith("train the built-in")]
    lines += ["", *(f"- {row['what']}" for row in extra if "error" not in row)] if extra else []
    failed = [f"- {row['measure']}, {row['what']}: {row['error']}" for row in rows if "error" in row]
    lines += ["", "Not measured:", "", *failed] if failed else []
    return "\n".join(lines) + "\n"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}"
